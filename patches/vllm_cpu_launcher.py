"""vLLM 0.9 starts processes of its own on CPU where ranks that were launched by others are to be its workers."""

from __future__ import annotations

from typing import Any

from mindspeed_mm_rl.platforms.patching import Patch


def _apply() -> None:
    import functools

    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    @functools.wraps(check)
    def check_and_keep_the_launcher(vllm_config: Any) -> None:
        launcher = vllm_config.parallel_config.distributed_executor_backend
        check(vllm_config)
        vllm_config.parallel_config.distributed_executor_backend = launcher

    CpuPlatform.check_and_update_config = staticmethod(check_and_keep_the_launcher)


PATCH = Patch(
    package="vllm",
    versions="<0.10",
    process="rollout",
    devices=("cpu",),
    changes=("vllm.platforms.cpu.CpuPlatform.check_and_update_config",),
    until="vLLM 0.9 is no longer supported",
    apply=_apply,
)
