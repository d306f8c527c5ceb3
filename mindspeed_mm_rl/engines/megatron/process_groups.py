"""Process groups of the train engine, over megatron's parallel_state."""

from __future__ import annotations

import datetime
import math

import torch.distributed as dist

from mindspeed_mm_rl.config.plan import TrainPlan
from mindspeed_mm_rl.platforms import device


def initialize(plan: TrainPlan, rank: int, world_size: int, meeting: str | dist.Store) -> None:
    """Joins the trainer's world and builds megatron's groups. meeting: host:port for all ranks, or a store for all.

    The bound is given twice: megatron's own groups ignore the one of init_process_group.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    dist.init_process_group(
        device.collective_backend(),
        **({"init_method": f"tcp://{meeting}"} if isinstance(meeting, str) else {"store": meeting}),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=plan.timeout_seconds),
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=plan.tensor_parallel_size,
        pipeline_model_parallel_size=plan.pipeline_parallel_size,
        context_parallel_size=plan.context_parallel_size,
        expert_model_parallel_size=plan.expert_parallel_size,
        distributed_timeout_minutes=plan.timeout_seconds / 60,
    )
    device.seed_everything(plan.seed)
    model_parallel_cuda_manual_seed(plan.seed)


def destroy() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def data_parallel_sum(values: dict[str, float]) -> dict[str, float]:
    """Sums of the same-named values over the data-parallel ranks (they hold different samples)."""
    return dict(zip(values, _reduce(list(values.values()), dist.ReduceOp.SUM), strict=True))


def data_parallel_max(value: float) -> float:
    """NaN counts as infinite: gloo's maximum loses a NaN of any rank but the first."""
    return _reduce([math.inf if math.isnan(value) else value], dist.ReduceOp.MAX)[0]


def _reduce(values: list[float], op: dist.ReduceOp) -> list[float]:
    import torch
    from megatron.core import parallel_state

    reduced = torch.tensor(values, dtype=torch.float64, device=device.current())
    if dist.get_world_size(parallel_state.get_data_parallel_group()) > 1:
        dist.all_reduce(reduced, op=op, group=parallel_state.get_data_parallel_group())
    return reduced.tolist()
