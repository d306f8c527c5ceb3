"""Ray binding of the train engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mindspeed_mm_rl.workers.train import TrainWorker
from mindspeed_mm_rl.workers.worker import fetched

if TYPE_CHECKING:
    import torch

    from mindspeed_mm_rl.engines.base import PolicyLoss
    from mindspeed_mm_rl.types import Batch, ImageFeatures, ImageInput


class ActorWorker(TrainWorker):
    """One process of the trainer group."""

    def new_engine(self) -> Any:
        from mindspeed_mm_rl.engines.megatron.engine import MegatronTrainEngine

        return MegatronTrainEngine(self.plan, **self.engine_options)

    def encode(self, images: dict[str, ImageInput], is_first: bool) -> tuple[dict[str, ImageFeatures] | None, int]:
        """The encoded table, and how many pictures it holds; nothing but of the first of several ranks that encode the same together."""
        table = self.engine.encode(images)
        return (table, len(table)) if is_first else (None, 0)

    def logprobs(self, batch: Batch, rows: list[int], images: list[Any]) -> dict[int, torch.Tensor]:
        with self.tracer.stage("actor_compute_log_prob"):
            return self.engine.logprobs(batch, rows, fetched(images))

    def ref_logprobs(self, batch: Batch, rows: list[int], images: list[Any]) -> dict[int, torch.Tensor]:
        with self.tracer.stage("reference_compute_log_prob"):
            return self.engine.ref_logprobs(batch, rows, fetched(images))

    def update(
        self, batch: Batch, rows: list[int], images: list[Any], policy_loss: PolicyLoss, num_loss_tokens: float, num_sequences: float
    ) -> dict[str, float]:
        from mindspeed_mm_rl.engines.base import UpdateRequest

        with self.tracer.stage("actor_update"):
            return self.engine.update(UpdateRequest(batch, rows, num_loss_tokens, num_sequences), fetched(images), policy_loss)

    def gradients(
        self,
        batch: Batch,
        rows: list[int],
        images: list[Any],
        policy_loss: PolicyLoss,
        num_loss_tokens: float,
        num_sequences: float,
        is_first: bool,
    ) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        """Of several ranks that have the same gradients by features the first one hands them out."""
        from mindspeed_mm_rl.engines.base import UpdateRequest

        request = UpdateRequest(batch, rows, num_loss_tokens, num_sequences)
        with self.tracer.stage("actor_update"):
            metrics, gradients = self.engine.gradients(request, fetched(images), policy_loss)
        return metrics, gradients if is_first else {}

    def step(self, grad_norm: float) -> dict[str, float]:
        return self.engine.step(grad_norm)
