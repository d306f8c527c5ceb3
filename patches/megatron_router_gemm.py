"""megatron's router of experts asks whether te_general_gemm is None, but binds the name only where Transformer Engine can be imported."""

from __future__ import annotations

from mindspeed_mm_rl.platforms import versions
from mindspeed_mm_rl.platforms.patching import Patch


def _apply() -> None:
    from megatron.core.transformer.moe import moe_utils

    vars(moe_utils).setdefault("te_general_gemm", None)


PATCH = Patch(
    package="megatron-core",
    versions=">=0.13",
    process="train",
    changes=("megatron.core.transformer.moe.moe_utils.te_general_gemm",),
    until="megatron binds the name without Transformer Engine (0.19 does not)",
    condition="Transformer Engine is not installed",
    holds=lambda: versions.installed("transformer-engine") is None,
    apply=_apply,
)
