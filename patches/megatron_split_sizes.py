"""all_to_all_single wants split sizes as numbers; megatron's token dispatcher of experts converts them only when they are CUDA tensors."""

from __future__ import annotations

from typing import Any

from mindspeed_mm_rl.platforms.patching import Patch


def _apply() -> None:
    import torch
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


PATCH = Patch(
    package="megatron-core",
    versions=">=0.12",
    process="train",
    devices=("cpu",),
    changes=("megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu",),
    until="megatron converts tensors of any device",
    apply=_apply,
)
