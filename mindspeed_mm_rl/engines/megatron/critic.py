"""The critic's engine: a value model that says, before each response token, what reward is still to come."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from mindspeed_mm_rl.algorithms.losses import ValueLossInput
from mindspeed_mm_rl.config.plan import TrainPlan
from mindspeed_mm_rl.engines.base import UpdateRequest, ValueLoss
from mindspeed_mm_rl.engines.megatron.micro_batch import MicroBatch
from mindspeed_mm_rl.engines.megatron.network import NetworkEngine, new_networks
from mindspeed_mm_rl.models.families import read_architecture
from mindspeed_mm_rl.models.names import with_value_head
from mindspeed_mm_rl.models.value import ValueModel
from mindspeed_mm_rl.models.value_weights import value_reader
from mindspeed_mm_rl.types import Batch, Images


class MegatronCriticEngine(NetworkEngine):
    def __init__(self, plan: TrainPlan) -> None:
        """Needs process_groups.initialize first."""
        architecture = read_architecture(plan.hf_path)
        reader = value_reader(plan.load, architecture.raw)
        super().__init__(plan, new_networks(ValueModel, architecture, plan, with_value_head(architecture.raw), reader))

    def values(self, batch: Batch, rows: Sequence[int], images: Images) -> dict[int, torch.Tensor]:
        return self._by_sample(self.networks, _head, batch, rows, images)

    def update(self, request: UpdateRequest, images: Images, value_loss: ValueLoss) -> dict[str, float]:
        """The batch needs `values` and `returns`."""
        return self._gradients(request, images, _head, partial(self._loss, request=request, value_loss=value_loss)) | self._step()

    def _loss(
        self, micro: MicroBatch, values: torch.Tensor, request: UpdateRequest, value_loss: ValueLoss
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        batch = micro.batch
        old, returns, mask = (column.values.to(values.device) for column in (batch.values, batch.returns, batch.loss_mask))
        return value_loss(ValueLossInput(values, old, returns, mask, request.num_loss_tokens))


def _head(network: ValueModel, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor]:
    """The value of the state in which a token was chosen stands one place before the token, where its log-prob comes from too."""
    return (network.values(hidden),)
