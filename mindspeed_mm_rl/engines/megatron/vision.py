"""The vision encoder in processes of its own: pictures in, image tokens out, and their gradients back in where it is trained.

frozen     encode once per iteration --features--> everybody
trained    encode --features--> actor: forward, backward --gradients by features--> backward (each picture run again) --> step
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from mindspeed_mm_rl.config.plan import TrainPlan
from mindspeed_mm_rl.engines.megatron import saves
from mindspeed_mm_rl.engines.megatron.encoding import PictureEncoder, passes
from mindspeed_mm_rl.engines.megatron.offload import OffloadedState, network_tensors
from mindspeed_mm_rl.engines.megatron.optimizer import ready_gradients
from mindspeed_mm_rl.engines.megatron.process_groups import grid_place
from mindspeed_mm_rl.engines.megatron.publishing import PublishingEngine
from mindspeed_mm_rl.models.families import read_architecture
from mindspeed_mm_rl.models.gpt import ModelOptions
from mindspeed_mm_rl.models.names import Entry
from mindspeed_mm_rl.models.placement import Piece
from mindspeed_mm_rl.models.rank_pieces import Grid, read_pieces
from mindspeed_mm_rl.models.vision_tower import VisionTower, vision_entries, vision_pieces
from mindspeed_mm_rl.models.weight_sources import VISION_PARTS, source_of
from mindspeed_mm_rl.types import ImageFeatures, ImageInput


class FrozenVisionEngine:
    def __init__(self, plan: TrainPlan) -> None:
        """Needs process_groups.initialize first."""
        self.networks = [new_tower(plan, plan.load)]
        self.pictures = PictureEncoder(plan)
        self.state = OffloadedState(plan.offload, {"param": lambda: network_tensors(self.networks)})

    def encode(self, images: dict[str, ImageInput]) -> dict[str, ImageFeatures]:
        """Every picture through the encoder once; on all ranks of a tensor-parallel group."""
        self.state.hold("param")
        return self.pictures.features(self.networks[0], images)

    def offload(self) -> None:
        """As NetworkEngine's."""
        self.state.hold()

    def take_seconds(self) -> dict[str, float]:
        return self.state.take_seconds()

    def save(self, folder: Path) -> None:
        """Weights alone, so that a save holds the whole model."""
        self.state.hold("param")
        saves.save_weights(folder, self.networks)

    def load(self, folder: Path) -> None:
        """Nothing to do: the weights of the save are those that the engine was built with."""


class TrainedVisionEngine(PublishingEngine):
    """Between two calls nothing is kept of a picture: its activations would take more memory than running it twice takes time."""

    def __init__(self, plan: TrainPlan, with_reference: bool) -> None:
        """Needs process_groups.initialize first."""
        super().__init__(plan, [new_tower(plan, plan.load)])
        self.references = [new_tower(plan, plan.reference_load).requires_grad_(False)] if with_reference else []

    def encode(self, images: dict[str, ImageInput]) -> dict[str, ImageFeatures]:
        self.state.hold("param")
        return self._encoder().features(self.network, images)

    def ref_encode(self, images: dict[str, ImageInput]) -> dict[str, ImageFeatures]:
        if not self.references:
            raise ValueError("reference features were asked for, but the engine was built without a reference (init_kl_coef is 0)")
        self.state.hold("reference")
        return self._encoder().features(self.references[0], images)

    def backward(self, images: dict[str, ImageInput], gradients: Sequence[dict[str, torch.Tensor]]) -> float:
        """As TrainedVisionEngine of engines/base.py."""
        from megatron.core.distributed import finalize_model_grads

        self.state.hold("param", "grad", "optimizer")
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        seen = {key for table in gradients for key in table}
        for chosen in passes([image for image in images.values() if image.key in seen]):
            features = self._encoder().one_pass(self.network, chosen)
            of_each = [_summed([table[image.key] for table in gradients if image.key in table]) for image in chosen]
            torch.autograd.backward(features, [gradient.to(feature) for gradient, feature in zip(of_each, features, strict=True)])
        finalize_model_grads(self.models, None)
        return ready_gradients(self.optimizer)

    def published(self) -> tuple[list[tuple[Piece, ...]], list[Entry]]:
        return [vision_pieces(self.architecture, grid_place().tensor, self.plan.tensor_parallel_size)], vision_entries(self.architecture)


def _summed(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """In the given order, which must be the same in every run: sums of floats depend on it."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def new_tower(plan: TrainPlan, weights: str) -> VisionTower:
    """With the weights of any kind of folder that holds a vision encoder. Raises ValueError for a model without one."""
    architecture = read_architecture(plan.hf_path)
    if architecture.vision is None:
        raise ValueError(f"{plan.hf_path}: a {architecture.model_type} model has no vision encoder")
    grid = Grid(((architecture.vision.num_layers,),), tensor=plan.tensor_parallel_size)
    options = ModelOptions(dtype=getattr(torch, plan.dtype), recompute=plan.recompute, deterministic=plan.deterministic, grid=grid)
    tower = VisionTower(architecture, options, plan.freeze_vision, plan.freeze_projector)
    pieces = vision_pieces(architecture, grid_place().tensor, plan.tensor_parallel_size)
    tower.load_weights(read_pieces(source_of(weights, architecture.raw, VISION_PARTS), pieces))
    return tower
