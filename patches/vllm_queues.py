"""vLLM makes a queue of 24 MiB with a name in /dev/shm in every group of ranks, for executors that hand requests from one rank to the
others: it stays there after a kill. Here every rank has the requests."""

from __future__ import annotations

from mindspeed_mm_rl.platforms.patching import Patch


def _apply() -> None:
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    MessageQueue.create_from_process_group = staticmethod(lambda *_, **__: None)


PATCH = Patch(
    package="vllm",
    versions=">=0.9.1",
    process="rollout",
    changes=("vllm.distributed.device_communicators.shm_broadcast.MessageQueue.create_from_process_group",),
    until="the executor of externally launched ranks makes no queues",
    apply=_apply,
)
