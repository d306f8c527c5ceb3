"""Processes that share experts, and each of them, have unequal numbers of tokens, but gloo collects and scatters equal parts only; between
any two processes it exchanges what they like."""

from __future__ import annotations

from typing import Any

from mindspeed_mm_rl.platforms.patching import Patch


def _apply() -> None:
    import torch
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_any(part: torch.Tensor, group: Any = None, output_split_sizes: Any = None, *rest: Any, **named: Any) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(part, group, output_split_sizes, *rest, **named)
        ranks, sizes = group.size(), [int(size) for size in output_split_sizes]
        whole = part.new_empty((sum(sizes), *part.shape[1:]))
        torch.distributed.all_to_all_single(whole, torch.cat([part] * ranks), sizes, [len(part)] * ranks, group=group)
        return whole

    def reduce_scatter_any(whole: torch.Tensor, group: Any = None, input_split_sizes: Any = None, *rest: Any, **named: Any) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(whole, group, input_split_sizes, *rest, **named)
        ranks, sizes = group.size(), [int(size) for size in input_split_sizes]
        parts = whole.new_empty((ranks * sizes[group.rank()], *whole.shape[1:]))
        torch.distributed.all_to_all_single(parts, whole.contiguous(), [sizes[group.rank()]] * ranks, sizes, group=group)
        return parts.view(ranks, -1, *whole.shape[1:]).sum(0) if len(parts) else parts

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_any, reduce_scatter_any


PATCH = Patch(
    package="megatron-core",
    versions=">=0.12",
    process="train",
    devices=("cpu",),
    changes=(
        "megatron.core.tensor_parallel.mappings._gather_along_first_dim",
        "megatron.core.tensor_parallel.mappings._reduce_scatter_along_first_dim",
    ),
    until="gloo takes parts of unequal size",
    apply=_apply,
)
