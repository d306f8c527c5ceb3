"""vllm-ascend 0.11 turns the matrices of experts round when they are loaded for the first time, and never again: new weights stay as they
came, and every product is taken with the wrong side of them."""

from __future__ import annotations

from typing import Any

from mindspeed_mm_rl.platforms.patching import Patch


def _apply() -> None:
    import functools

    from vllm_ascend.ops.common_fused_moe import AscendUnquantizedFusedMoEMethod

    load = AscendUnquantizedFusedMoEMethod.process_weights_after_loading

    @functools.wraps(load)
    def load_anew(self: Any, layer: Any) -> None:
        self.transpose = True
        load(self, layer)

    AscendUnquantizedFusedMoEMethod.process_weights_after_loading = load_anew


PATCH = Patch(
    package="vllm-ascend",
    versions=">=0.11,<0.12",
    process="rollout",
    devices=("npu",),
    changes=("vllm_ascend.ops.common_fused_moe.AscendUnquantizedFusedMoEMethod.process_weights_after_loading",),
    until="vllm-ascend 0.11 is no longer supported",
    apply=_apply,
)
