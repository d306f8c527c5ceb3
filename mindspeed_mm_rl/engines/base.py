"""The engines as the rest of the program sees them: one trains a policy, one a critic, one samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from mindspeed_mm_rl.algorithms.losses import ValueLossInput
from mindspeed_mm_rl.types import Batch, ImageFeatures, ImageInput, Images, LossInput, RolloutGroup, RolloutRequest, Sampling
from mindspeed_mm_rl.weights.device import Address, Arrivals
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


class SharesDevice(Protocol):
    """State that leaves the device when others are to work there. What an engine is asked to do brings back what that needs."""

    def take_seconds(self) -> dict[str, float]:
        """What leaving and coming took since this was last asked, by the names of timing metrics."""


class Offloads(SharesDevice, Protocol):
    def offload(self) -> None:
        """On all ranks at once, and never between gradients and the step that they are for."""


class Publishes(Protocol):
    """Weights for rollout engines, by the one way or the other; on all ranks at once."""

    def publish_weights(self, nodes: Sequence[str]) -> WeightHandle | None:
        """nodes: of all ranks. The handle for readers on this rank's node comes from one rank of each node."""

    def send_weights(self, address: Address | None) -> None:
        """To the reader on this rank's device, while it reads; None where there is none."""


class TrainEngine(Offloads, Publishes, Protocol):
    def encode(self, images: dict[str, ImageInput]) -> dict[str, ImageFeatures]: ...

    def logprobs(self, batch: Batch, rows: Sequence[int], images: Images) -> dict[int, torch.Tensor]:
        """{sample_id: log-probs of its response tokens [length], float32 on CPU} under the current policy, of this rank's rows.

        Of the ranks that share a row one answers, the others return {}.
        """

    def ref_logprobs(self, batch: Batch, rows: Sequence[int], images: Images) -> dict[int, torch.Tensor]: ...

    def update(self, request: UpdateRequest, images: Images, policy_loss: PolicyLoss) -> dict[str, float]:
        """Forward, backward, optimizer step; returns metrics of the global mini-batch, whole on the last stage of a pipeline."""

    def gradients(
        self, request: UpdateRequest, images: dict[str, ImageFeatures], policy_loss: PolicyLoss
    ) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        """`update` up to its optimizer step: metrics with this network's part of the gradient norm, and gradients by image features."""

    def step(self, grad_norm: float) -> dict[str, float]:
        """The rest of it; grad_norm: over all networks that are clipped together."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class VisionEngine(Offloads, Protocol):
    """A vision encoder in processes of its own. All ranks of a tensor-parallel group make every call with the same pictures."""

    def encode(self, images: dict[str, ImageInput]) -> dict[str, ImageFeatures]: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class TrainedVisionEngine(VisionEngine, Publishes, Protocol):
    def ref_encode(self, images: dict[str, ImageInput]) -> dict[str, ImageFeatures]:
        """With the weights of the KL reference."""

    def backward(self, images: dict[str, ImageInput], gradients: Sequence[dict[str, torch.Tensor]]) -> float:
        """From gradients by the features of `encode`, which are summed by picture, to those by the weights; their norm.

        On all ranks, those without a picture too.
        """

    def step(self, grad_norm: float) -> dict[str, float]:
        """Of the optimizer; grad_norm: over all networks that are clipped together."""


class CriticEngine(Offloads, Protocol):
    def values(self, batch: Batch, rows: Sequence[int], images: Images) -> dict[int, torch.Tensor]:
        """{sample_id: value before each of its response tokens [length], float32 on CPU}; as logprobs."""

    def update(self, request: UpdateRequest, images: Images, value_loss: ValueLoss) -> dict[str, float]:
        """Forward, backward, optimizer step; returns metrics of the global mini-batch."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class RolloutEngine(SharesDevice, Protocol):
    def sleep(self) -> None:
        """Weights leave the device, keys and values are forgotten, as far as the device has such a mode."""

    def generate(self, requests: list[RolloutRequest], images: Images, sampling: Sampling) -> Iterator[RolloutGroup]:
        """Yields each group as soon as its last sample is finished, in finish order."""

    def receive_weights(self, source: WeightHandle | Arrivals, policy_version: int) -> None:
        """Copies the weights and drops every cache that the old ones filled."""
