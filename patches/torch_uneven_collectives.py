"""The ranks that share an expert bring as many tokens as chose it, but gloo gathers and scatters parts of one size alone."""

from __future__ import annotations

from typing import Any

from mindspeed_mm_rl.platforms.patching import Patch


def _apply() -> None:
    import functools

    import torch

    all_gather, reduce_scatter = torch.distributed.all_gather, torch.distributed.reduce_scatter

    @functools.wraps(all_gather)
    def gather(parts: list[torch.Tensor], own: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        longest = max(len(part) for part in parts)
        if all(len(part) == longest for part in parts):
            return all_gather(parts, own, group=group, async_op=async_op)
        padded = [part.new_empty(longest, *part.shape[1:]) for part in parts]
        all_gather(padded, torch.cat([own, own.new_zeros(longest - len(own), *own.shape[1:])]), group=group)
        for part, whole in zip(parts, padded, strict=True):
            part.copy_(whole[: len(part)])

    @functools.wraps(reduce_scatter)
    def scatter(own: torch.Tensor, parts: list[torch.Tensor], *arguments: Any, group: Any = None, **named: Any) -> Any:
        if all(len(part) == len(own) for part in parts):
            return reduce_scatter(own, parts, *arguments, group=group, **named)
        whole = torch.cat(parts)
        torch.distributed.all_reduce(whole, *arguments, group=group)
        own.copy_(whole.split([len(part) for part in parts])[torch.distributed.get_rank(group)])

    torch.distributed.all_gather, torch.distributed.reduce_scatter = gather, scatter


PATCH = Patch(
    package="torch",
    versions=">=2.5",
    process="train",
    devices=("cpu",),
    changes=("torch.distributed.all_gather", "torch.distributed.reduce_scatter"),
    until="gloo takes parts of unequal size",
    apply=_apply,
)
