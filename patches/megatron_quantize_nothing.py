"""Without Transformer Engine megatron 0.12 raises when it is asked to quantize no parameter, which its distributed optimizer does in every
step."""

from __future__ import annotations

from typing import Any

from mindspeed_mm_rl.platforms import versions
from mindspeed_mm_rl.platforms.patching import Patch


def _apply() -> None:
    from megatron.core.optimizer import distrib_optimizer

    quantize = distrib_optimizer.quantize_param_shard

    def quantize_some(parameters: Any, *rest: Any, **named: Any) -> Any:
        return quantize(parameters, *rest, **named) if parameters else None

    distrib_optimizer.quantize_param_shard = quantize_some


PATCH = Patch(
    package="megatron-core",
    versions=">=0.12,<0.13",
    process="train",
    # On NPU MindSpeed replaces the function.
    devices=("cpu", "cuda"),
    changes=("megatron.core.optimizer.distrib_optimizer.quantize_param_shard",),
    until="megatron-core 0.12 is no longer supported",
    condition="Transformer Engine is not installed",
    holds=lambda: versions.installed("transformer-engine") is None,
    apply=_apply,
)
