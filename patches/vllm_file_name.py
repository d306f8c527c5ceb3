"""On CPU vLLM's own all-reduce goes through a file in /dev/shm under a name that is the same for every job of a machine: where one was
left, the next job fails, and who waits in it for a dead rank waits for ever. Where ranks do not agree on the name, vLLM takes gloo."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mindspeed_mm_rl.platforms.patching import Patch

if TYPE_CHECKING:
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher


def _apply() -> None:
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    meet = ExecutorWithExternalLauncher._distributed_args

    def meet_under_own_name(executor: ExecutorWithExternalLauncher) -> tuple[str, int, int]:
        """How to meet (which has happened), rank, and number of the device."""
        method, rank, local_rank = meet(executor)
        return f"{method}:rank-{rank}", rank, local_rank

    ExecutorWithExternalLauncher._distributed_args = meet_under_own_name


PATCH = Patch(
    package="vllm",
    versions=">=0.18",
    process="rollout",
    devices=("cpu",),
    changes=("vllm.v1.executor.uniproc_executor.ExecutorWithExternalLauncher._distributed_args",),
    until="the name of the file is one of its job",
    apply=_apply,
)
