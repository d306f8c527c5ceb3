"""The processes of a tensor-parallel rollout engine. Each of them runs the whole of vLLM and its scheduler on the same requests in the same
order; so they take the same steps, and only the layers meet in collectives.

    rank 0      step, step, group! --yields it--> reader: more or no more? --said to all--> step, step, ...
    the others  step, step, group! -------------- waits for the word of rank 0 -----------> step, step, ...
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from mindspeed_mm_rl.engines.vllm.launching import LaunchedRank
from mindspeed_mm_rl.platforms import compat, device, env

if TYPE_CHECKING:
    from mindspeed_mm_rl.config.plan import RolloutPlan
    from mindspeed_mm_rl.types import RolloutGroup


def join(store: dist.TCPStore, rank: int, size: int, timeout_seconds: float) -> None:
    """Call before the engine is built. store: of the ranks of this engine alone."""
    # vLLM reads these; its own meeting never takes place, as the process group is there already. Ray shows each process its device alone.
    env.set_all({"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(size), "MASTER_ADDR": store.host, "MASTER_PORT": str(store.port)})
    timeout = datetime.timedelta(seconds=timeout_seconds)
    dist.init_process_group(device.collective_backend(), store=store, rank=rank, world_size=size, timeout=timeout)


def engine_arguments(plan: RolloutPlan) -> dict[str, Any]:
    """{} for an engine of one process."""
    if plan.tensor_parallel_size == 1:
        return {}
    seconds = math.ceil(plan.timeout_seconds)
    # Groups that vLLM makes ignore the bound of the world. Old versions have none to give.
    bounds = compat.supported_arguments(EngineArgs, {"distributed_timeout_seconds": seconds, "cpu_distributed_timeout_seconds": seconds})
    launcher = LaunchedRank if current_platform.is_cpu() else "external_launcher"
    return {"tensor_parallel_size": plan.tensor_parallel_size, "distributed_executor_backend": launcher, **bounds}


class Pace:
    """Ends a stream on all ranks of an engine at the same group: one that goes on alone waits for the others in a collective."""

    def __init__(self, plan: RolloutPlan) -> None:
        """All ranks at the same time."""
        timeout = datetime.timedelta(seconds=plan.timeout_seconds)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if plan.tensor_parallel_size > 1 else None

    def kept(self, groups: Iterable[RolloutGroup]) -> Generator[RolloutGroup, None, bool]:
        """Yields the groups; returns whether rank 0's reader wants more, and raises GeneratorExit where that reader is."""
        more = False
        try:
            for group in groups:  # noqa: UP028  Ray sends into the generator, which an iterator of a list doesn't take
                yield group
            more = True
        finally:
            more = self._word_of_rank_0(more)
        return more

    def _word_of_rank_0(self, more: bool) -> bool:
        if self._group is None:
            return more
        word = torch.tensor([int(more)])
        dist.broadcast(word, src=0, group=self._group)
        return bool(word)
