"""The engines as the rest of the program sees them: one trains a policy, one a critic, one samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from mindspeed_mm_rl.algorithms.losses import ValueLossInput
from mindspeed_mm_rl.types import Batch, ImageFeatures, ImageInput, Images, LossInput, RolloutGroup, RolloutRequest, Sampling
from mindspeed_mm_rl.weights.host import WeightHandle

PolicyLoss = Callable[[LossInput], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""Returns the loss to differentiate and metrics; both are sums that are already divided by the global denominators, so that adding
them over micro-batches and ranks gives the value of the whole mini-batch."""

ValueLoss = Callable[[ValueLossInput], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""The same for a critic."""


@dataclass(frozen=True)
class UpdateRequest:
    """One optimizer step: a mini-batch, this rank's rows of it, and the denominators of the whole of it."""

    batch: Batch
    rows: Sequence[int]
    """May be empty: a rank without samples still takes part in the step."""
    num_loss_tokens: float
    num_sequences: float


class TrainEngine(Protocol):
    def encode(self, images: dict[str, ImageInput]) -> dict[str, ImageFeatures]: ...

    def logprobs(self, batch: Batch, images: Images) -> dict[int, torch.Tensor]:
        """{sample_id: log-probs of its response tokens [length], float32 on CPU} under the current policy."""

    def ref_logprobs(self, batch: Batch, images: Images) -> dict[int, torch.Tensor]: ...

    def update(self, request: UpdateRequest, images: Images, policy_loss: PolicyLoss) -> dict[str, float]:
        """Forward, backward, optimizer step; returns metrics of the global mini-batch."""

    def publish_weights(self) -> WeightHandle: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class CriticEngine(Protocol):
    def values(self, batch: Batch, images: Images) -> dict[int, torch.Tensor]:
        """{sample_id: value before each of its response tokens [length], float32 on CPU}"""

    def update(self, request: UpdateRequest, images: Images, value_loss: ValueLoss) -> dict[str, float]:
        """Forward, backward, optimizer step; returns metrics of the global mini-batch."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class RolloutEngine(Protocol):
    def generate(self, requests: list[RolloutRequest], images: Images, sampling: Sampling) -> Iterator[RolloutGroup]:
        """Yields each group as soon as its last sample is finished, in finish order."""

    def receive_weights(self, handle: WeightHandle, policy_version: int) -> None:
        """Copies the weights and drops every cache that the old ones filled."""
