"""vLLM's executor for processes that somebody else has started, on CPU with process groups alone."""

from __future__ import annotations

from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher


class LaunchedRank(ExecutorWithExternalLauncher):
    """On CPU vLLM's own all-reduce goes through a file in /dev/shm, under a name that is the same for every job of a machine. After a kill
    it stays, and the next job fails; and who waits in it for a dead rank waits for ever. Where ranks don't agree on the name, gloo does it.
    """

    def _distributed_args(self) -> tuple[str, int, int]:
        """How to meet (which has happened), rank, and number of the device."""
        method, rank, local_rank = super()._distributed_args()
        return f"{method}:rank-{rank}", rank, local_rank
