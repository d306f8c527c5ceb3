"""What crosses a process border: prompts, images, rollouts and batches. Columnar and ragged (values + lengths), never padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

GridTHW = tuple[int, int, int]

BAN_BIAS = -100.0
"""Added to the logits of token ids that must never be sampled (image and video markers), before the division by temperature, by
trainer and rollout engine alike. vLLM clamps logit_bias to [-100, 100]; exp(-100) is 0 next to any other token in float32."""


@dataclass(frozen=True)
class ImageInput:
    """One picture as every engine sees it: resized once, so that trainer and rollout engine never disagree on its size.

    Example: ImageInput(key="9f2c...", pixels=np.zeros((84, 84, 3), np.uint8), grid_thw=(1, 6, 6))
    """

    key: str
    """sha256 of shape and pixels: equal pictures are encoded once."""
    pixels: np.ndarray
    """uint8 [height, width, 3]; both sides are multiples of patch_size * merge_size."""
    grid_thw: GridTHW
    """Patches in time, height and width."""

    def num_tokens(self, merge_size: int) -> int:
        time, height, width = self.grid_thw
        return time * height * width // merge_size**2


@dataclass(frozen=True)
class PhaseReport:
    """What a process says of the work that it was last given. Example: PhaseReport(peak_bytes=3 << 30, seconds={"offload": 0.2})."""

    peak_bytes: int
    """The most memory that it had: of the device, on CPU its resident set."""
    seconds: dict[str, float]
    """What it took to bring its state to the device and to take it away, by the names of timing metrics."""


@dataclass(frozen=True)
class ImageFeatures:
    """A picture after the vision encoder and projector: what a frozen ViT shares with rollout, log-probs, reference and update."""

    embeddings: torch.Tensor
    """[image tokens, text hidden size]"""
    grid_thw: GridTHW


Images = dict[str, ImageInput] | dict[str, ImageFeatures]


@dataclass(frozen=True)
class Prompt:
    """One drawn question. Example: Prompt(prompt_id=7, token_ids=[...], expanded_length=31, images=(image,), answer="55")."""

    prompt_id: int
    """Running count of prompts drawn in the run: unique over epochs and refills."""
    token_ids: list[int]
    """The rendered chat template; one image token per image (the rollout engine expands, the trainer expands for itself)."""
    expanded_length: int
    """Tokens once every image token is repeated grid / merge_size ** 2 times."""
    images: tuple[ImageInput, ...]
    answer: str
    data_source: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RolloutRequest:
    """A prompt as the rollout engine needs it; sample k of n has the id `prompt_id * n + k`."""

    prompt_id: int
    token_ids: list[int]
    image_keys: tuple[str, ...]
    expanded_length: int


@dataclass(frozen=True)
class Sampling:
    """How the responses to a stream of requests are drawn. Example: Sampling(8) trains, Sampling(4, 0.6, "eval", False) evaluates."""

    num_samples: int
    """Per prompt."""
    temperature: float | None = None
    """None: that of the trained policy; 0.0: greedy, the most probable token."""
    stream: str = ""
    """Part of every sample's seed, so that equal ids of two streams have noise of their own; empty for training."""
    with_logprobs: bool = True
    """False: Rollout.logprobs stay empty."""


@dataclass(frozen=True)
class Rollout:
    sample_id: int
    token_ids: list[int]
    """Response tokens, the end-of-sequence token included when it was sampled."""
    logprobs: list[float]
    """Of the sampled tokens, after temperature and bans: the distribution that was sampled from."""
    finish: Literal["stop", "length"]
    policy_version: int


@dataclass(frozen=True)
class RolloutGroup:
    """What the rollout engine streams: all samples of one prompt, sorted by sample id."""

    prompt_id: int
    prompt_length: int
    """Prompt tokens after image expansion, as the rollout engine counted them (the loader's count must agree)."""
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True)
class Group:
    """A prompt, its samples, and what the rewards said of each of them."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    scores: dict[str, list[float]]
    """Verifier name -> raw value per sample, before weights."""
    accuracy: list[float]
    """1.0 right, 0.0 wrong, per sample, apart from the score."""
    rewards: list[float]
    """What training uses: the weighted sum with penalties, per sample."""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """`function/name` -> other numbers that a user's reward function gave, of those samples that have them."""


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths in one flat tensor. Example: Ragged.from_rows([tensor([1, 2]), tensor([3])]).values == [1, 2, 3]."""

    values: torch.Tensor
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.values.shape[0] != sum(self.lengths):
            raise ValueError(f"Ragged: {self.values.shape[0]} values but lengths sum to {sum(self.lengths)}")

    def __len__(self) -> int:
        return len(self.lengths)

    @staticmethod
    def from_rows(rows: Sequence[torch.Tensor | Sequence[float]], dtype: torch.dtype) -> Ragged:
        tensors = [torch.as_tensor(row, dtype=dtype) for row in rows]
        return Ragged(torch.cat(tensors) if tensors else torch.empty(0, dtype=dtype), tuple(len(row) for row in tensors))

    def rows(self) -> tuple[torch.Tensor, ...]:
        return self.values.split(self.lengths)

    def select(self, index: Sequence[int]) -> Ragged:
        rows = self.rows()
        return Ragged.from_rows([rows[i] for i in index], self.values.dtype)


_RAGGED_FIELDS = (
    "prompts",
    "responses",
    "loss_mask",
    "rollout_logprobs",
    "old_logprobs",
    "ref_logprobs",
    "advantages",
    "values",
    "returns",
)


@dataclass(frozen=True)
class Batch:
    """Samples in training order. Every column has one row per sample; ragged columns but `prompts` have one value per response token."""

    sample_ids: tuple[int, ...]
    prompts: Ragged
    """int64, image tokens expanded."""
    responses: Ragged
    """int64"""
    loss_mask: Ragged
    """float32, 1.0 where a response token is trained on."""
    rollout_logprobs: Ragged
    image_keys: tuple[tuple[str, ...], ...]
    """Pictures of each sample's prompt, in order."""
    rewards: tuple[float, ...]
    samples_per_prompt: int
    """Samples of one prompt stand side by side, in sample-id order."""
    old_logprobs: Ragged | None = None
    ref_logprobs: Ragged | None = None
    advantages: Ragged | None = None
    values: Ragged | None = None
    returns: Ragged | None = None

    def __len__(self) -> int:
        return len(self.sample_ids)

    def select(self, index: Sequence[int]) -> Batch:
        """The rows `index` of every column, in that order."""
        ragged = {name: column.select(index) for name in _RAGGED_FIELDS if (column := getattr(self, name)) is not None}
        return replace(
            self,
            sample_ids=tuple(self.sample_ids[i] for i in index),
            image_keys=tuple(self.image_keys[i] for i in index),
            rewards=tuple(self.rewards[i] for i in index),
            **ragged,
        )

    def with_column(self, name: str, by_sample_id: dict[int, torch.Tensor]) -> Batch:
        """Adds a ragged float column from a {sample_id: values} answer; raises KeyError when a sample is missing."""
        return replace(self, **{name: Ragged.from_rows([by_sample_id[i] for i in self.sample_ids], torch.float32)})

    def total_lengths(self) -> list[int]:
        return [p + r for p, r in zip(self.prompts.lengths, self.responses.lengths, strict=True)]


@dataclass(frozen=True)
class LossInput:
    """All a policy loss may look at, for the response tokens of one micro-batch, flat [T].

    The denominators are global (the whole mini-batch over all ranks): per-rank means would give short ranks more weight.
    """

    logprobs: torch.Tensor
    """[T], with gradient"""
    entropy: torch.Tensor
    """[T]; with gradient only when an entropy bonus is on"""
    old_logprobs: torch.Tensor
    rollout_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    """[T], 0.0 or 1.0"""
    sequence_index: torch.Tensor
    """[T] int64: which sequence of this micro-batch a token belongs to"""
    num_loss_tokens: float
    """Sum of loss_mask over the global mini-batch."""
    num_sequences: float
    """Sequences in the global mini-batch."""
