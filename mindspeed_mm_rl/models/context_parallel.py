"""Context parallelism: the tokens of a pack are dealt to the ranks of a group, and attention still sees whole sequences.

ulysses: rank r has the r-th slice of the pack; before attention heads are exchanged for tokens, so that a rank attends over the whole
pack with its share of the heads (DeepSpeed-Ulysses, arXiv:2309.14509).
all_gather: the pack is cut into 2 * ranks slices, rank r has slices r and 2 * ranks - 1 - r, so that early tokens, which see few keys, and
late ones are shared alike; keys and values of all ranks are collected, heads are not split (Llama 3, arXiv:2407.21783, section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mindspeed_mm_rl.platforms.packed_sdpa import Segments

Algorithm = Literal["ulysses", "all_gather"]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Segments], torch.Tensor]


@dataclass(frozen=True)
class ContextShare:
    """One rank's tokens of a pack of T tokens."""

    algorithm: Algorithm
    own: torch.Tensor
    """int64 [T / ranks]: positions in the pack of this rank's tokens."""
    place: torch.Tensor
    """int64 [T]: where each token of the pack lies when the ranks' tokens stand one rank behind the other."""
    key_rows: torch.Tensor
    """int64: positions in the pack of the keys of each segment, one segment behind the other."""
    segments: Segments

    def local(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of `positions` in the pack [N] are this rank's (bool [N]), and where those lie among its tokens."""
        start = parallel_state.get_context_parallel_rank() * len(self.own)
        there = self.place[positions] - start
        mine = (there >= 0) & (there < len(self.own))
        return mine, there[mine]


def pack_multiple(ranks: int, algorithm: Algorithm) -> int:
    """What the tokens of a pack must be a multiple of."""
    return ranks * (2 if algorithm == "all_gather" else 1)


@lru_cache(maxsize=32)
def context_share(lengths: tuple[int, ...], ranks: int, rank: int, algorithm: Algorithm, device: torch.device) -> ContextShare:
    """The share of `rank` of sequences of `lengths` packed one behind the other; their sum must be a multiple of pack_multiple."""
    total = sum(lengths)
    by_rank = [_own(total, ranks, each, algorithm) for each in range(ranks)]
    place = torch.empty(total, dtype=torch.int64)
    place[torch.cat(by_rank)] = torch.arange(total)
    if algorithm == "ulysses":
        segments, keys = Segments.of(lengths, lengths, device), torch.empty(0, dtype=torch.int64)
    else:
        segments, keys = _segments(lengths, ranks, rank, device)
    return ContextShare(algorithm, by_rank[rank].to(device), place.to(device), keys.to(device), segments)


def _own(total: int, ranks: int, rank: int, algorithm: Algorithm) -> torch.Tensor:
    if algorithm == "ulysses":
        each = total // ranks
        return torch.arange(rank * each, (rank + 1) * each)
    return torch.cat([torch.arange(start, stop) for start, stop in _slices(total, ranks, rank)])


def _slices(total: int, ranks: int, rank: int) -> list[tuple[int, int]]:
    each = total // (2 * ranks)
    return [(part * each, (part + 1) * each) for part in (rank, 2 * ranks - 1 - rank)]


def _segments(lengths: Sequence[int], ranks: int, rank: int, device: torch.device) -> tuple[Segments, torch.Tensor]:
    """Every stretch of a sequence in a slice, with all keys of the sequence up to the stretch's end."""
    queries, keys, rows = [], [], []
    for first, last in _slices(sum(lengths), ranks, rank):
        start = 0
        for length in lengths:
            begin, end = max(start, first), min(start + length, last)
            if begin < end:
                queries.append(end - begin)
                keys.append(end - start)
                rows.append(torch.arange(start, end))
            start += length
    return Segments.of(queries, keys, device), torch.cat(rows)


def attend_over_ranks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, share: ContextShare, attend: Attend) -> torch.Tensor:
    """query [T / ranks, heads, dim], key and value [T / ranks, kv_heads, dim] -> [T / ranks, heads, value dim].

    Raises ValueError when ulysses can't deal the key/value heads to the ranks.
    """
    group = parallel_state.get_context_parallel_group()
    if share.algorithm == "all_gather":
        whole = [_Collected.apply(tensor, group)[share.place][share.key_rows] for tensor in (key, value)]
        return attend(query, *whole, share.segments)
    ranks = dist.get_world_size(group)
    key, value = (_enough_heads(tensor, ranks) for tensor in (key, value))
    exchanged = [_heads_for_tokens(tensor, group) for tensor in (query, key, value)]
    return _tokens_for_heads(attend(*exchanged, share.segments), group)


def _enough_heads(tensor: torch.Tensor, ranks: int) -> torch.Tensor:
    """Key/value heads are repeated where there are fewer than ranks."""
    heads = tensor.shape[1]
    if heads % ranks == 0:
        return tensor
    if ranks % heads:
        raise ValueError(
            f"context_parallel_size ({ranks}) and the key/value heads of a rank ({heads}) must divide one another under ulysses_cp_algo: "
            "change context_parallel_size or take context_parallel_algo: megatron_cp_algo"
        )
    return tensor.repeat_interleave(ranks // heads, dim=1)


def _heads_for_tokens(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """[T / ranks, heads, dim] -> [T, heads / ranks, dim]"""
    by_rank = torch.stack(tensor.chunk(dist.get_world_size(group), dim=1))
    return _Exchanged.apply(by_rank, group).flatten(0, 1)


def _tokens_for_heads(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """[T, heads / ranks, dim] -> [T / ranks, heads, dim]"""
    by_rank = tensor.unflatten(0, (dist.get_world_size(group), -1))
    return torch.cat(_Exchanged.apply(by_rank, group).unbind(0), dim=1)


class _Exchanged(torch.autograd.Function):
    """[ranks, ...]: part r goes to rank r; the gradient goes back the same way."""

    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return _exchange(parts, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _exchange(gradient, ctx.group), None


def _exchange(parts: torch.Tensor, group: Any) -> torch.Tensor:
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received


class _Collected(torch.autograd.Function):
    """[T / ranks, ...] -> [T, ...], one rank behind the other; gradients of all ranks are summed where they belong."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        whole = tensor.new_empty((dist.get_world_size(group) * tensor.shape[0], *tensor.shape[1:]))
        dist.all_gather_into_tensor(whole, tensor.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        own = gradient.new_empty((gradient.shape[0] // dist.get_world_size(ctx.group), *gradient.shape[1:]))
        dist.reduce_scatter_tensor(own, gradient.contiguous(), group=ctx.group)
        return own, None


class _Joined(torch.autograd.Function):
    """Each rank has the values of its own positions [n] and gets those of all of them [N].

    Every rank computes the same loss from them, so the gradient of a rank's own values is its own part, not a sum.
    """

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, mine: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.save_for_backward(mine)
        whole = values.new_zeros(mine.shape[0])
        whole[mine] = values
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (mine,) = ctx.saved_tensors
        return gradient[mine], None, None


def joined(values: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
    """The values [N] of all positions, of which this rank computed those in `mine` (bool [N])."""
    return _Joined.apply(values, mine, parallel_state.get_context_parallel_group())
