"""vLLM 0.9 refuses float32 in its V1 engine, which computes in it all the same: the kernels take any type."""

from __future__ import annotations

from typing import Any

from mindspeed_mm_rl.platforms.patching import Patch


def _apply() -> None:
    import functools

    import torch
    from vllm.engine.arg_utils import EngineArgs

    ask = EngineArgs._is_v1_supported_oracle

    @functools.wraps(ask)
    def ask_about_others(self: Any, model_config: Any) -> bool:
        dtype = model_config.dtype
        model_config.dtype = torch.bfloat16 if dtype is torch.float32 else dtype
        try:
            return ask(self, model_config)
        finally:
            model_config.dtype = dtype

    EngineArgs._is_v1_supported_oracle = ask_about_others


PATCH = Patch(
    package="vllm",
    versions="<0.10",
    process="rollout",
    changes=("vllm.engine.arg_utils.EngineArgs._is_v1_supported_oracle",),
    until="vLLM 0.9 is no longer supported",
    apply=_apply,
)
