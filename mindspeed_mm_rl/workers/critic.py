"""Ray binding of the critic's engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mindspeed_mm_rl.workers.train import TrainWorker
from mindspeed_mm_rl.workers.worker import fetched

if TYPE_CHECKING:
    import torch

    from mindspeed_mm_rl.engines.base import ValueLoss
    from mindspeed_mm_rl.types import Batch


class CriticWorker(TrainWorker):
    """One process of the critic's group, which has process groups of its own."""

    def new_engine(self) -> Any:
        from mindspeed_mm_rl.engines.megatron.critic import MegatronCriticEngine

        return MegatronCriticEngine(self.plan)

    def values(self, batch: Batch, rows: list[int], images: list[Any]) -> dict[int, torch.Tensor]:
        return self.engine.values(batch, rows, fetched(images))

    def update(
        self, batch: Batch, rows: list[int], images: list[Any], value_loss: ValueLoss, num_loss_tokens: float, num_sequences: float
    ) -> dict[str, float]:
        from mindspeed_mm_rl.engines.base import UpdateRequest

        return self.engine.update(UpdateRequest(batch, rows, num_loss_tokens, num_sequences), fetched(images), value_loss)
