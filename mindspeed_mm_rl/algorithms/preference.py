"""Losses on pairs of responses to one prompt, a chosen and a rejected one: sums that are already divided by global denominators.

A pair is two neighbouring sequences, the chosen one first, and must lie in one micro-batch whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch.nn.functional import logsigmoid

from mindspeed_mm_rl.types import Batch, LossInput

LossType = Literal["sigmoid", "robust", "hinge", "ipo", "simpo", "orpo"]
PolicyLoss = Callable[[LossInput], tuple[torch.Tensor, dict[str, torch.Tensor]]]

_LARGEST_LOGPROB = -1e-6
"""Of a mean over tokens where odds are taken, which are infinite at 0."""


@dataclass(frozen=True)
class PreferenceSettings:
    """Field for field a run's plan.preference but for what only the trainer uses. Example: PreferenceSettings("sigmoid", beta=0.1)."""

    loss_type: LossType
    beta: float = 0.1
    """How strongly the policy is held near the reference; of simpo the reward's scale, of orpo the weight of the odds ratio."""
    label_smoothing: float = 0.0
    """sigmoid, robust: the share of pairs whose labels are taken to be the wrong way round."""
    simpo_gamma: float = 0.5
    """simpo: the margin that rewards should reach."""
    pref_ftx: float = 0.0
    """Weight of the supervised term, the mean of -log-prob over the tokens of all chosen responses; orpo has it at 1 besides."""


def _sigmoid(chosen: torch.Tensor, rejected: torch.Tensor, settings: PreferenceSettings) -> torch.Tensor:
    """-(1 - e) log sigmoid(b D) - e log sigmoid(-b D), D = chosen - rejected (DPO, arXiv 2305.18290, eq. 7; e: conservative DPO)."""
    logits = settings.beta * (chosen - rejected)
    return -(1.0 - settings.label_smoothing) * logsigmoid(logits) - settings.label_smoothing * logsigmoid(-logits)


def _robust(chosen: torch.Tensor, rejected: torch.Tensor, settings: PreferenceSettings) -> torch.Tensor:
    """The unbiased estimate of DPO's loss when a share e of labels is swapped (arXiv 2403.00409)."""
    logits, swapped = settings.beta * (chosen - rejected), settings.label_smoothing
    return ((swapped - 1.0) * logsigmoid(logits) + swapped * logsigmoid(-logits)) / (1.0 - 2.0 * swapped)


def _hinge(chosen: torch.Tensor, rejected: torch.Tensor, settings: PreferenceSettings) -> torch.Tensor:
    """max(0, 1 - b D) (SLiC, arXiv 2305.10425, with DPO's reward)."""
    return torch.relu(1.0 - settings.beta * (chosen - rejected))


def _ipo(chosen: torch.Tensor, rejected: torch.Tensor, settings: PreferenceSettings) -> torch.Tensor:
    """(D - 1 / 2b)^2 of log-ratios per token (arXiv 2310.12036, eq. 17; the paper sums over tokens, its authors' runs and TRL divide)."""
    return (chosen - rejected - 1.0 / (2.0 * settings.beta)).square()


def _simpo(chosen: torch.Tensor, rejected: torch.Tensor, settings: PreferenceSettings) -> torch.Tensor:
    """-log sigmoid(b D - gamma) of log-probs per token (arXiv 2405.14734, eq. 6)."""
    return -logsigmoid(settings.beta * (chosen - rejected) - settings.simpo_gamma)


def _orpo(chosen: torch.Tensor, rejected: torch.Tensor, settings: PreferenceSettings) -> torch.Tensor:
    """-b log sigmoid(log odds(chosen) - log odds(rejected)), odds = p / (1 - p), p = exp(log-prob per token) (arXiv 2403.07691, eq. 7)."""
    return -settings.beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logprobs: torch.Tensor) -> torch.Tensor:
    bounded = logprobs.clamp(max=_LARGEST_LOGPROB)
    return bounded - torch.log(-torch.expm1(bounded))


@dataclass(frozen=True)
class Objective:
    """What a loss type stands for."""

    of_pairs: Callable[[torch.Tensor, torch.Tensor, PreferenceSettings], torch.Tensor]
    """(scores [P] of the chosen responses, of the rejected ones) -> losses [P]."""
    compares_with_reference: bool = True
    """A response's score is the sum over its tokens of logprob - reference's; otherwise of logprob alone."""
    per_token: bool = False
    """True: the mean over its tokens."""
    supervised: float = 0.0
    """Weight of the supervised term, besides pref_ftx."""


OBJECTIVES: dict[str, Objective] = {
    "sigmoid": Objective(_sigmoid),
    "robust": Objective(_robust),
    "hinge": Objective(_hinge),
    "ipo": Objective(_ipo, per_token=True),
    "simpo": Objective(_simpo, compares_with_reference=False, per_token=True),
    "orpo": Objective(_orpo, compares_with_reference=False, per_token=True, supervised=1.0),
}


def loss_of(batch: Batch, settings: PreferenceSettings) -> PolicyLoss:
    """The loss of this mini-batch of pairs; it can be sent to another process."""
    num_chosen_tokens = float(sum(mask.sum() for mask in batch.loss_mask.rows()[::2]))
    return partial(preference_loss, settings=settings, num_chosen_tokens=num_chosen_tokens)


def preference_loss(x: LossInput, settings: PreferenceSettings, num_chosen_tokens: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean over pairs of the loss type's loss, and the supervised term. num_chosen_tokens: of the global mini-batch.

    Returns the loss (scalar, with gradient) and detached metrics, means over pairs: a reward is beta times what the loss compares, `logps`
    are sums over tokens; `sft_loss` is there where the loss has it.

    Raises:
        ValueError: the loss compares with a reference, but there are no reference log-probs.
    """
    objective = OBJECTIVES[settings.loss_type]
    inside = x.loss_mask > 0
    logprobs, tokens = _kept(x.logprobs, inside), _of_sequences(inside.float(), x)
    sums = _of_sequences(logprobs, x)
    # Differences first: sums over a long response have lost the digits in which policy and reference differ.
    scores = _of_sequences(logprobs - _kept(_reference(x), inside), x) if objective.compares_with_reference else sums
    if objective.per_token:
        scores = scores / tokens.clamp(min=1.0)
    # Ranks stay in step by running pairs that have no weight; a constant score has no gradient either.
    is_pair = tokens.amin(-1) > 0
    chosen, rejected = torch.where(is_pair[:, None], scores, -1.0).unbind(-1)

    def mean(of_pairs: torch.Tensor) -> torch.Tensor:
        return torch.where(is_pair, of_pairs, 0.0).sum() / (x.num_sequences / 2)

    loss = mean(objective.of_pairs(chosen, rejected, settings))
    rewards = settings.beta * torch.stack([chosen, rejected]).detach()
    metrics = {
        "rewards/chosen": mean(rewards[0]),
        "rewards/rejected": mean(rewards[1]),
        "rewards/margins": mean(rewards[0] - rewards[1]),
        "rewards/accuracies": mean((rewards[0] > rewards[1]).to(rewards.dtype)),
        "logps/chosen": mean(sums[:, 0].detach()),
        "logps/rejected": mean(sums[:, 1].detach()),
    }
    if weight := settings.pref_ftx + objective.supervised:
        supervised = -sums[:, 0].sum() / num_chosen_tokens
        metrics["sft_loss"], loss = supervised.detach(), loss + weight * supervised
    return loss, {"loss": loss.detach()} | metrics


def _of_sequences(values: torch.Tensor, x: LossInput) -> torch.Tensor:
    """[P, 2] sums of `values` [T] over chosen and rejected sequence of each pair."""
    # index_add rather than bincount, which has no deterministic kernel on CUDA.
    num_pairs = int(x.sequence_index.max()) // 2 + 1 if len(values) else 0
    return values.new_zeros(2 * num_pairs).index_add(0, x.sequence_index, values).view(num_pairs, 2)


def _kept(values: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """In float32 at least, exactly 0 outside the mask whatever stands there."""
    return torch.where(inside, values.to(torch.promote_types(values.dtype, torch.float32)), 0.0)


def _reference(x: LossInput) -> torch.Tensor:
    if x.ref_logprobs is None:
        raise ValueError("the loss compares with a reference, but the batch has no reference log-probs: fill the column before the update")
    return x.ref_logprobs
