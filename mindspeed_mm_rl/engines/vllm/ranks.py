"""The processes of a rollout engine. Each of them runs the whole of vLLM and its scheduler; those of a tensor-parallel group on the same
requests in the same order, so that they take the same steps, and only the layers meet in collectives.

    rank 0      step, step, group! --yields it--> reader: more or no more? --said to all--> step, step, ...
    the others  step, step, group! -------------- waits for the word of rank 0 -----------> step, step, ...

Where several such groups share the experts, each has requests of its own, and all meet in every step: they ask each other after each, and
who has nothing left takes empty steps until all are done.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from vllm.engine.arg_utils import EngineArgs

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
    if plan.num_ranks == 1:
        return {}
    if plan.data_parallel_size > 1 and not compat.vllm_renders():
        raise ValueError(
            f"rollout: infer_expert_parallel_size is {plan.data_parallel_size}, which needs vLLM 0.18 or newer; with this vLLM set it to 1"
        )
    seconds = math.ceil(plan.timeout_seconds)
    # Groups that vLLM makes ignore the bound of the world. Old versions have none to give.
    bounds = compat.supported_arguments(EngineArgs, {"distributed_timeout_seconds": seconds, "cpu_distributed_timeout_seconds": seconds})
    return {
        "tensor_parallel_size": plan.tensor_parallel_size,
        "data_parallel_size": plan.data_parallel_size,
        "enable_expert_parallel": plan.expert_parallel,
        # With it a rank that has nothing left might take no step where the others wait for one.
        **({"async_scheduling": False} if plan.data_parallel_size > 1 else {}),
        "distributed_executor_backend": "external_launcher",
        # vLLM's own kernel looks up the other ranks' devices among those that the process sees, which is one: IndexError.
        "disable_custom_all_reduce": True,
        **bounds,
    }


class Pace:
    """Ends a stream on all ranks of an engine at the same group: one that goes on alone waits for the others in a collective."""

    def __init__(self, plan: RolloutPlan) -> None:
        """All ranks at the same time."""
        timeout = datetime.timedelta(seconds=plan.timeout_seconds)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if plan.num_ranks > 1 else None
        self._in_every_step = plan.data_parallel_size > 1

    def agree(self, error: ValueError | None) -> None:
        """Before the first step. Raises the error of the first rank that has one, on all of them: none may step without the others."""
        errors: list[ValueError | None] = [error]
        if self._in_every_step:
            errors = [None] * dist.get_world_size(self._group)
            dist.all_gather_object(errors, error, group=self._group)
        for found in errors:
            if found is not None:
                raise found

    def kept(self, groups: Sequence[RolloutGroup]) -> Generator[RolloutGroup, None, bool]:
        """After a step: yields its groups; returns whether every reader wants more, and raises GeneratorExit where one does not."""
        if not groups and not self._in_every_step:
            return True
        more = False
        try:
            for group in groups:  # noqa: UP028  Ray sends into the generator, which an iterator of a list doesn't take
                yield group
            more = True
        finally:
            more = self._wanted_by_all(more)
        return more

    def _wanted_by_all(self, more: bool) -> bool:
        if self._group is None:
            return more
        word = torch.tensor([int(more)])
        dist.all_reduce(word, dist.ReduceOp.MIN, group=self._group)
        return bool(word)
