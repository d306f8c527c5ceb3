"""One packed forward pass: which tokens go in, and which hidden states predict the response tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mindspeed_mm_rl.types import Batch, Images, Ragged


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a batch, packed. Example: one row with prompt [5, 6] and response [7, 8] has hidden_index [1, 2], targets [7, 8]."""

    batch: Batch
    token_rows: tuple[torch.Tensor, ...]
    """Prompt and response of each row, int64."""
    image_keys: tuple[str, ...]
    """Pictures in the order in which their image tokens stand in the packed tokens; a picture of n samples stands n times."""
    hidden_index: torch.Tensor
    """[response tokens] place of the hidden state that predicts the token: one before it."""
    targets: torch.Tensor
    """[response tokens]"""
    sequence_index: torch.Tensor
    """[response tokens] row that the token belongs to"""

    @property
    def tokens(self) -> torch.Tensor:
        return torch.cat(self.token_rows)

    @property
    def response_lengths(self) -> tuple[int, ...]:
        return self.batch.responses.lengths


def masked(batch: Batch, count: int) -> Batch:
    """The first `count` samples without any weight: what a rank with fewer micro-batches than others runs, to stay in step with them."""
    first = batch.select(range(count))
    return replace(first, loss_mask=Ragged(torch.zeros_like(first.loss_mask.values), first.loss_mask.lengths))


def pack(batch: Batch, rows: Sequence[int]) -> MicroBatch:
    share = batch.select(rows)
    prompts, responses = share.prompts.rows(), share.responses.rows()
    starts, start = [], 0
    for prompt, response in zip(prompts, responses, strict=True):
        starts.append(start + len(prompt) - 1)
        start += len(prompt) + len(response)
    return MicroBatch(
        batch=share,
        token_rows=tuple(torch.cat(pair) for pair in zip(prompts, responses, strict=True)),
        image_keys=tuple(key for keys in share.image_keys for key in keys),
        hidden_index=torch.cat([torch.arange(s, s + len(r)) for s, r in zip(starts, responses, strict=True)]),
        targets=share.responses.values,
        sequence_index=torch.repeat_interleave(torch.arange(len(responses)), torch.tensor(share.responses.lengths)),
    )


def grids_by_row(micro: MicroBatch, images: Images) -> list[list[tuple[int, int, int]]]:
    return [[images[key].grid_thw for key in keys] for keys in micro.batch.image_keys]
