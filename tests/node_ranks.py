"""Ranks of two nodes that share no folders: each sees its own root, and the folders below it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from mindspeed_mm_rl.config.plan import TrainPlan
from tests.layout_ranks import make_batch, own_rows


def run(rank: int, world: int, address: str, plan: TrainPlan, roots: list[str], folder: str, resumes: bool) -> list[dict[str, float]]:
    """Two updates with a save between them, or the second one alone from that save; metrics of each, as every rank knows them."""
    from mindspeed_mm_rl.platforms import device

    device.set_threads(1)
    device.adapt_megatron()
    from mindspeed_mm_rl.engines.megatron import process_groups

    process_groups.initialize(plan, rank, world, address)
    try:
        return _updates(plan, Path(roots[rank] + folder), resumes)
    finally:
        process_groups.destroy()


def _updates(plan: TrainPlan, folder: Path, resumes: bool) -> list[dict[str, float]]:
    from mindspeed_mm_rl.algorithms.losses import PolicyLossSettings, clipped_policy_loss
    from mindspeed_mm_rl.engines.base import UpdateRequest
    from mindspeed_mm_rl.engines.megatron.engine import MegatronTrainEngine

    engine: Any = MegatronTrainEngine(plan, with_reference=False, entropy_bonus=False, publish_vision=True)
    batch = make_batch(engine.architecture, {})
    request = UpdateRequest(batch, own_rows(batch), float(batch.loss_mask.values.sum()), float(len(batch)))
    update = functools.partial(
        engine.update, request, {}, functools.partial(clipped_policy_loss, settings=PolicyLossSettings(0.2, 0.28, kl_coef=0.05))
    )
    if resumes:
        engine.load(folder)
        return [update()]
    first = update()
    engine.save(folder)
    return [first, update()]
