"""vLLM in processes that somebody else has started, without the files in /dev/shm that a kill would leave behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher


class LaunchedRank(ExecutorWithExternalLauncher):
    """On CPU vLLM's own all-reduce goes through a file under a name that is the same for every job of a machine: where one was left, the
    next job fails. And who waits in it for a dead rank waits for ever. Where ranks don't agree on the name, vLLM takes gloo.
    """

    def _distributed_args(self) -> tuple[str, int, int]:
        """How to meet (which has happened), rank, and number of the device."""
        method, rank, local_rank = super()._distributed_args()
        return f"{method}:rank-{rank}", rank, local_rank


@contextmanager
def without_queues() -> Iterator[None]:
    """While an engine is built, on all its ranks. vLLM (0.32) makes a queue of 24 MiB with a name in /dev/shm in every group of ranks, for
    executors that hand requests from one rank to the others; here every rank has them."""
    make = MessageQueue.create_from_process_group
    MessageQueue.create_from_process_group = staticmethod(lambda *_, **__: None)
    try:
        yield
    finally:
        MessageQueue.create_from_process_group = staticmethod(make)
