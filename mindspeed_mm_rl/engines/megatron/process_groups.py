"""Process groups of the train engine, over megatron's parallel_state."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from mindspeed_mm_rl.config.plan import TrainPlan
from mindspeed_mm_rl.models.rank_pieces import Grid, GridPlace, even_stages
from mindspeed_mm_rl.platforms import device


def initialize(plan: TrainPlan, rank: int, world_size: int, meeting: str | dist.Store) -> None:
    """Joins the trainer's world and builds megatron's groups. meeting: host:port for all ranks, or a store for all.

    The bound is given twice: megatron's own groups ignore the one of init_process_group.
    """
    dist.init_process_group(
        device.collective_backend(),
        **({"init_method": f"tcp://{meeting}"} if isinstance(meeting, str) else {"store": meeting}),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=plan.timeout_seconds),
    )
    build_groups(plan)


def group_sizes(plan: TrainPlan) -> dict[str, int | None]:
    """Arguments of megatron's initialize_model_parallel."""
    virtual = len(plan.pipeline_layers)
    return {
        "tensor_model_parallel_size": plan.tensor_parallel_size,
        "pipeline_model_parallel_size": plan.pipeline_parallel_size,
        "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None,
        "context_parallel_size": plan.context_parallel_size,
        "expert_model_parallel_size": plan.expert_parallel_size,
        "expert_tensor_parallel_size": plan.expert_tensor_parallel_size,
    }


def build_groups(plan: TrainPlan) -> None:
    """Megatron's groups over a world that is there, and the random states that depend on them."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(**group_sizes(plan), distributed_timeout_minutes=plan.timeout_seconds / 60)
    device.seed_everything(plan.seed)
    model_parallel_cuda_manual_seed(plan.seed)


def destroy_groups() -> None:
    """Undoes build_groups."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    # 0.12 would keep these for the next groups.
    parallel_state._EMBEDDING_GLOBAL_RANKS = parallel_state._POSITION_EMBEDDING_GLOBAL_RANKS = None


def destroy() -> None:
    destroy_groups()
    dist.destroy_process_group()


def grid(plan: TrainPlan, num_layers: int) -> Grid:
    """How the plan spreads a network of so many text layers."""
    stages = plan.pipeline_layers or even_stages(num_layers, plan.pipeline_parallel_size)
    return Grid(stages, plan.tensor_parallel_size, plan.expert_parallel_size, plan.expert_tensor_parallel_size)


def grid_place() -> GridPlace:
    """This process's place in it."""
    from megatron.core import parallel_state

    return GridPlace(
        tensor=parallel_state.get_tensor_model_parallel_rank(),
        pipeline=parallel_state.get_pipeline_model_parallel_rank(),
        expert=parallel_state.get_expert_model_parallel_rank(),
        expert_tensor=parallel_state.get_expert_tensor_parallel_rank(),
    )


def speaks() -> bool:
    """Whether this rank answers for its model replica: of those that compute the same numbers the first."""
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.get_context_parallel_rank() == 0


def world_max(values: Sequence[float]) -> list[float]:
    """Over all ranks, pipeline stages included. NaN counts as infinite."""
    return _everybodys([math.inf if math.isnan(value) else value for value in values], dist.group.WORLD).amax(0).tolist()


def data_parallel_sum(values: dict[str, float]) -> dict[str, float]:
    """Sums of the same-named values over the data-parallel ranks (they hold different samples)."""
    from megatron.core import parallel_state

    sums = _everybodys(list(values.values()), parallel_state.get_data_parallel_group()).sum(0)
    return dict(zip(values, sums.tolist(), strict=True))


def data_parallel_max(value: float) -> float:
    from megatron.core import parallel_state

    return float(_everybodys([value], parallel_state.get_data_parallel_group()).amax())


def _everybodys(values: list[float], group: dist.ProcessGroup) -> torch.Tensor:
    """float64 [ranks, values] on the host.

    Sent as whole numbers of the same bits: no reduction of an NPU takes float64, and the all_reduce that MindSpeed puts in place leaves
    such a tensor as it was, without an error.
    """
    own = torch.tensor(values, dtype=torch.float64).view(torch.int64).to(device.current())
    ranks = dist.get_world_size(group)
    every = own.new_empty(ranks * len(values))
    dist.all_gather_into_tensor(every, own, group=group)
    return every.cpu().view(torch.float64).view(ranks, len(values))
