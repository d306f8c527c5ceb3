"""Ray binding of the vision encoder's engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mindspeed_mm_rl.workers.train import TrainWorker

if TYPE_CHECKING:
    import torch

    from mindspeed_mm_rl.types import ImageFeatures, ImageInput


class VisionWorker(TrainWorker):
    """One process of the vision workers, which have process groups of their own."""

    def new_engine(self) -> Any:
        from mindspeed_mm_rl.engines.megatron.vision import FrozenVisionEngine

        return FrozenVisionEngine(self.plan)

    def encode(self, images: dict[str, ImageInput], is_first: bool) -> tuple[dict[str, ImageFeatures] | None, int]:
        """As the actor's."""
        table = self.engine.encode(images)
        return (table, len(table)) if is_first else (None, 0)


class TrainedVisionWorker(VisionWorker):
    def new_engine(self) -> Any:
        from mindspeed_mm_rl.engines.megatron.vision import TrainedVisionEngine

        return TrainedVisionEngine(self.plan, **self.engine_options)

    def ref_encode(self, images: dict[str, ImageInput], is_first: bool) -> tuple[dict[str, ImageFeatures] | None, int]:
        table = self.engine.ref_encode(images)
        return (table, len(table)) if is_first else (None, 0)

    def backward(self, images: dict[str, ImageInput], gradients: list[Any]) -> float:
        """gradients: object refs of tables {key: gradient by a picture's features}."""
        import ray

        tables: list[dict[str, torch.Tensor]] = ray.get(gradients)
        return self.engine.backward(images, [{key: table[key] for key in table.keys() & images.keys()} for table in tables])

    def step(self, grad_norm: float) -> dict[str, float]:
        return self.engine.step(grad_norm)
