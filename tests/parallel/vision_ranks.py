"""One rank of an actor without a vision encoder, or of the vision workers beside it: run by RankPool, in worlds of their own."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm_rl.config.plan import TrainPlan
from tests.layout_ranks import own_rows
from tests.pictures import batch_of, pictures

Table = dict[str, torch.Tensor]


@contextmanager
def _world(plan: TrainPlan, rank: int, world: int, address: str) -> Iterator[None]:
    from mindspeed_mm_rl.platforms import device

    device.set_threads(1)
    device.adapt_megatron()
    from mindspeed_mm_rl.engines.megatron import process_groups

    process_groups.initialize(plan, rank, world, address)
    try:
        yield
    finally:
        process_groups.destroy()


def _own_pictures(plan: TrainPlan) -> dict[str, Any]:
    """Of this copy of the encoder."""
    from megatron.core import parallel_state

    images = pictures(Path(plan.hf_path))
    copies, copy = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    return dict(list(images.items())[copy::copies])


def features(rank: int, world: int, address: str, plan: TrainPlan, file: Path) -> None:
    """Every rank's to FILE.RANK."""
    with _world(plan, rank, world, address):
        from mindspeed_mm_rl.engines.megatron.vision import FrozenVisionEngine

        encoded = FrozenVisionEngine(plan).encode(_own_pictures(plan))
    torch.save({key: feature.embeddings for key, feature in encoded.items()}, f"{file}.{rank}")


def gradients_by_features(
    rank: int, world: int, address: str, plan: TrainPlan, encoded: Path, file: Path
) -> tuple[float, dict[str, float]]:
    """This rank's table to FILE.RANK, where it has the first stage and is the first of its tensor-parallel group."""
    with _world(plan, rank, world, address):
        from megatron.core import parallel_state

        from mindspeed_mm_rl.algorithms.losses import PolicyLossSettings, clipped_policy_loss
        from mindspeed_mm_rl.engines.base import UpdateRequest
        from mindspeed_mm_rl.engines.megatron.engine import MegatronTrainEngine
        from mindspeed_mm_rl.types import ImageFeatures

        images = pictures(Path(plan.hf_path))
        batch = batch_of(Path(plan.hf_path), images)
        tables = {key: ImageFeatures(value, images[key].grid_thw) for key, value in torch.load(encoded, weights_only=True).items()}
        engine = MegatronTrainEngine(plan, with_reference=False, entropy_bonus=False, publish_vision=False)
        request = UpdateRequest(batch, own_rows(batch), float(batch.loss_mask.values.sum()), float(len(batch)))
        loss = functools.partial(clipped_policy_loss, settings=PolicyLossSettings(0.2, 0.28))
        metrics, found = engine.gradients(request, tables, loss)
        is_first = parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.is_pipeline_first_stage()
    torch.save(found if is_first else {}, f"{file}.{rank}")
    return metrics["grad_norm"], metrics


def gradients_by_weights(rank: int, world: int, address: str, plan: TrainPlan, tables: list[Table], file: Path) -> float:
    """The pieces of whole Hugging Face gradients that this rank has to FILE.RANK; returns their norm over all ranks."""
    with _world(plan, rank, world, address):
        from mindspeed_mm_rl.engines.megatron.process_groups import grid_place
        from mindspeed_mm_rl.engines.megatron.vision import TrainedVisionEngine
        from mindspeed_mm_rl.models.rank_files import put
        from mindspeed_mm_rl.models.vision_tower import vision_entries, vision_pieces
        from mindspeed_mm_rl.models.weight_layout import separate_one

        engine = TrainedVisionEngine(plan, with_reference=False)
        norm = engine.backward(_own_pictures(plan), tables)
        own = {name: parameter.main_grad for name, parameter in engine.network.named_parameters()}
        whole = {
            n: torch.full(shape, torch.nan) for e in vision_entries(engine.architecture) for n, shape in zip(e.hf, e.hf_shapes, strict=True)
        }
        for piece in vision_pieces(engine.architecture, grid_place().tensor, plan.tensor_parallel_size):
            for index, (name, cut) in enumerate(zip(piece.entry.hf, piece.cuts, strict=True)):
                part = separate_one(piece.entry, own[piece.name], index)
                whole[name].copy_(part) if cut is None else put(whole[name], cut, part)
    torch.save(whole, f"{file}.{rank}")
    return norm
