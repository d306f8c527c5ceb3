"""What the tensors of a train engine take after an update, and what was estimated for its rank."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch

from mindspeed_mm_rl.config.plan import TrainPlan
from tests.offload_phases import inputs, request


def run(rank: int, world: int, address: str, plan: TrainPlan) -> tuple[list[int], list[int]]:
    """A rank of RankPool: bytes of (parameters, gradients, optimizer) as they are, and estimated."""
    from mindspeed_mm_rl.platforms import device

    device.set_threads(1)
    device.adapt_megatron()
    from mindspeed_mm_rl.algorithms.losses import PolicyLossSettings, clipped_policy_loss
    from mindspeed_mm_rl.engines.footprint import state_bytes
    from mindspeed_mm_rl.engines.megatron import process_groups
    from mindspeed_mm_rl.engines.megatron.engine import MegatronTrainEngine
    from mindspeed_mm_rl.engines.megatron.offload import gradient_tensors, network_tensors, optimizer_tensors
    from mindspeed_mm_rl.models.rank_pieces import chunk_pieces, grid_entries

    process_groups.initialize(plan, rank, world, address)
    try:
        engine = MegatronTrainEngine(plan, with_reference=False, entropy_bonus=False, publish_vision=False)
        batch, images, rows = inputs(engine, plan)
        engine.update(request(batch, rows), images, partial(clipped_policy_loss, settings=PolicyLossSettings(0.2, 0.2)))
        grid, place = process_groups.grid(plan, engine.architecture.text.num_layers), process_groups.grid_place()
        table = grid_entries(engine.architecture.raw, grid, plan.with_vision)
        state = state_bytes([piece for virtual in range(grid.virtual) for piece in chunk_pieces(table, grid, place, virtual)], plan, world)
        seen: set[int] = set()
        parts = network_tensors(engine.networks), gradient_tensors(engine.models), optimizer_tensors(engine.optimizer)
        return [_new_bytes(part, seen) for part in parts], [state.parameters, state.gradients, state.optimizer]
    finally:
        process_groups.destroy()


def _new_bytes(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    """Of the memory under the tensors that wasn't seen before: many are views of one buffer."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    new = storages.keys() - seen
    seen |= new
    return sum(storages[pointer] for pointer in new)
