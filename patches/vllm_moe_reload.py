"""On CPU vLLM packs the weights of experts when it builds their kernel, and builds none where there is one: new weights are loaded, but the
packed ones silently stay the old ones."""

from __future__ import annotations

from typing import Any

from mindspeed_mm_rl.platforms.patching import Patch


def _apply() -> None:
    import functools

    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    load = UnquantizedFusedMoEMethod.process_weights_after_loading

    @functools.wraps(load)
    def load_anew(self: Any, *arguments: Any, **named: Any) -> None:
        self.moe_kernel = None
        load(self, *arguments, **named)

    UnquantizedFusedMoEMethod.process_weights_after_loading = load_anew


PATCH = Patch(
    package="vllm",
    versions=">=0.27",
    process="rollout",
    devices=("cpu",),
    changes=("vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method.UnquantizedFusedMoEMethod.process_weights_after_loading",),
    until="vLLM packs the experts of every update on CPU",
    apply=_apply,
)
