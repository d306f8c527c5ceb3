"""Ray binding of the train engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mindspeed_mm_rl.workers.train import TrainWorker
from mindspeed_mm_rl.workers.worker import fetched

if TYPE_CHECKING:
    import torch

    from mindspeed_mm_rl.engines.base import PolicyLoss
    from mindspeed_mm_rl.types import Batch, ImageFeatures, ImageInput
    from mindspeed_mm_rl.weights.host import WeightHandle


class ActorWorker(TrainWorker):
    """One process of the trainer group."""

    def new_engine(self) -> Any:
        from mindspeed_mm_rl.engines.megatron.engine import MegatronTrainEngine

        return MegatronTrainEngine(self.plan, **self.engine_options)

    def encode(self, images: dict[str, ImageInput]) -> tuple[dict[str, ImageFeatures], int]:
        """The encoded table, and how many pictures it holds."""
        table = self.engine.encode(images)
        return table, len(table)

    def logprobs(self, batch: Batch, rows: list[int], images: list[Any]) -> dict[int, torch.Tensor]:
        return self.engine.logprobs(batch.select(rows), fetched(images))

    def ref_logprobs(self, batch: Batch, rows: list[int], images: list[Any]) -> dict[int, torch.Tensor]:
        return self.engine.ref_logprobs(batch.select(rows), fetched(images))

    def update(
        self, batch: Batch, rows: list[int], images: list[Any], policy_loss: PolicyLoss, num_loss_tokens: float, num_sequences: float
    ) -> dict[str, float]:
        from mindspeed_mm_rl.engines.base import UpdateRequest

        return self.engine.update(UpdateRequest(batch, rows, num_loss_tokens, num_sequences), fetched(images), policy_loss)

    def publish_weights(self) -> WeightHandle:
        return self.engine.publish_weights()
