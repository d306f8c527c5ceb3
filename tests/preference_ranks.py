"""One rank of a few updates on pairs under any layout, run by RankPool."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mindspeed_mm_rl.config.plan import TrainPlan
from tests.layout_ranks import make_batch, make_images, own_rows

STEPS = 2


@dataclass(frozen=True)
class Seen:
    references: dict[int, list[float]]
    """Log-probs of this rank's samples under the reference."""
    metrics: list[dict[str, float]]
    """Of each update; where another rank knows it, without the loss."""
    later_logprobs: dict[int, list[float]]
    """After the last update."""


def run(rank: int, world: int, address: str, plan: TrainPlan, loss_type: str) -> Seen:
    from mindspeed_mm_rl.platforms import device

    device.set_threads(1)
    device.adapt_megatron()
    from mindspeed_mm_rl.engines.megatron import process_groups

    process_groups.initialize(plan, rank, world, address)
    try:
        return _train(plan, loss_type)
    finally:
        process_groups.destroy()


def _train(plan: TrainPlan, loss_type: str) -> Seen:
    from mindspeed_mm_rl.algorithms.preference import PreferenceSettings, loss_of
    from mindspeed_mm_rl.engines.base import UpdateRequest
    from mindspeed_mm_rl.engines.megatron.engine import MegatronTrainEngine

    engine = MegatronTrainEngine(plan, with_reference=True, entropy_bonus=False, publish_vision=False)
    images = make_images(Path(plan.hf_path)) if engine.architecture.vision else {}
    # Two samples a group: the pairs.
    batch = make_batch(engine.architecture, images)
    rows, has_encoder = own_rows(batch), engine.architecture.vision is not None and engine.networks[0].pre_process
    pictures = engine.encode(images) if has_encoder and engine.vision_is_frozen else images
    references = engine.ref_logprobs(batch, rows, pictures)
    request = UpdateRequest(batch, rows, float(batch.loss_mask.values.sum()), float(len(batch)))
    loss = loss_of(batch, PreferenceSettings(loss_type, beta=0.2, pref_ftx=0.1))
    metrics = [engine.update(request, pictures, loss) for _ in range(STEPS)]
    return Seen(_listed(references), metrics, _listed(engine.logprobs(batch, rows, pictures)))


def _listed(logprobs: dict[int, torch.Tensor]) -> dict[int, list[float]]:
    return {sample_id: values.tolist() for sample_id, values in logprobs.items()}
