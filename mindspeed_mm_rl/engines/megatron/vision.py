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
from mindspeed_mm_rl.engines.megatron.offload import OffloadedState, gradient_tensors, network_tensors, optimizer_tensors
from mindspeed_mm_rl.engines.megatron.optimizer import build_optimizer, build_schedule, ready_gradients, step, wrap_for_data_parallel
from mindspeed_mm_rl.engines.megatron.process_groups import grid_place
from mindspeed_mm_rl.models.families import Architecture, read_architecture
from mindspeed_mm_rl.models.gpt import ModelOptions
from mindspeed_mm_rl.models.rank_pieces import Grid, read_pieces
from mindspeed_mm_rl.models.vision_tower import VisionTower, vision_pieces
from mindspeed_mm_rl.models.weight_sources import VISION_PARTS, source_of
from mindspeed_mm_rl.types import ImageFeatures, ImageInput
from mindspeed_mm_rl.weights.host import HostBuffer


class FrozenVisionEngine:
    def __init__(self, plan: TrainPlan) -> None:
        """Needs process_groups.initialize first."""
        self.plan = plan
        self.architecture = read_architecture(plan.hf_path)
        self.pictures = PictureEncoder(plan)
        self.network = new_tower(self.architecture, plan, plan.load)
        self.networks = [self.network]
        self.state = OffloadedState(plan.offload, {"param": lambda: network_tensors(self.networks)})

    def offload(self) -> None:
        """As NetworkEngine.offload."""
        self.state.hold()

    def encode(self, images: dict[str, ImageInput]) -> dict[str, ImageFeatures]:
        """Every picture through the encoder once; on all ranks of a tensor-parallel group."""
        self.state.hold("param")
        return self.pictures.features(self.network, images)

    def save(self, folder: Path) -> None:
        """Weights alone, so that a save holds the whole model."""
        self.state.hold("param")
        saves.save_weights(folder, self.networks)

    def load(self, folder: Path) -> None:
        """Nothing to do: the weights of the save are those that the engine was built with."""


class TrainedVisionEngine(FrozenVisionEngine):
    """Between two calls nothing is kept of a picture: its activations would take more memory than running it twice takes time."""

    def __init__(self, plan: TrainPlan, with_reference: bool) -> None:
        """Needs process_groups.initialize first."""
        super().__init__(plan)
        self.reference = new_tower(self.architecture, plan, plan.reference_load).requires_grad_(False) if with_reference else None
        self.models = wrap_for_data_parallel(self.networks, plan.optimizer)
        self.optimizer = build_optimizer(self.models, plan.optimizer, getattr(torch, plan.dtype))
        self.schedule = build_schedule(self.optimizer, plan.optimizer)
        self.buffer: HostBuffer | None = None
        parts = {
            "param": lambda: network_tensors(self.networks),
            "reference": lambda: network_tensors([self.reference] if self.reference else []),
            "grad": lambda: gradient_tensors(self.models),
            "optimizer": lambda: optimizer_tensors(self.optimizer),
        }
        self.state = OffloadedState(plan.offload, parts)

    def ref_encode(self, images: dict[str, ImageInput]) -> dict[str, ImageFeatures]:
        if self.reference is None:
            raise ValueError("reference features were asked for, but the engine was built without a reference (init_kl_coef is 0)")
        self.state.hold("reference")
        return self.pictures.features(self.reference, images)

    def backward(self, images: dict[str, ImageInput], gradients: Sequence[dict[str, torch.Tensor]]) -> float:
        from megatron.core.distributed import finalize_model_grads

        self.state.hold("param", "grad", "optimizer")
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        for chosen in passes([image for image in images.values() if any(image.key in table for table in gradients)]):
            features = self.pictures.one_pass(self.network, chosen)
            of_each = [summed([table[image.key] for table in gradients if image.key in table]) for image in chosen]
            torch.autograd.backward(features, [each.to(one) for each, one in zip(of_each, features, strict=True)])
        finalize_model_grads(self.models, None)
        return ready_gradients(self.optimizer)

    def step(self, grad_norm: float) -> dict[str, float]:
        self.schedule.step(1)
        step(self.optimizer, self.plan.optimizer.clip_grad, grad_norm)
        return {"grad_norm": grad_norm, "lr": float(self.optimizer.param_groups[0]["lr"])}

    def save(self, folder: Path) -> None:
        self.state.hold("param", "optimizer")
        saves.save(folder, self.networks, self.optimizer, self.schedule)

    def load(self, folder: Path) -> None:
        self.state.hold("param", "optimizer")
        wanted = {"with_optimizer": not self.plan.no_load_optim, "with_rng": not self.plan.no_load_rng}
        saves.load(folder, self.networks, self.optimizer, self.schedule, **wanted)


def summed(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """In the given order, which must be the same in every run: sums of floats depend on it."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def new_tower(architecture: Architecture, plan: TrainPlan, weights: str) -> VisionTower:
    """With the weights of any kind of folder that holds a vision encoder."""
    grid = Grid(((architecture.vision.num_layers,),), tensor=plan.tensor_parallel_size)
    options = ModelOptions(dtype=getattr(torch, plan.dtype), recompute=plan.recompute, deterministic=plan.deterministic, grid=grid)
    tower = VisionTower(architecture, options, plan.freeze_vision, plan.freeze_projector)
    pieces = vision_pieces(architecture, grid_place().tensor, plan.tensor_parallel_size)
    tower.load_weights(read_pieces(source_of(weights, architecture.raw, VISION_PARTS), pieces))
    return tower
