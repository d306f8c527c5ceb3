"""Losses of policy and critic: functions that return sums already divided by global denominators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from mindspeed_mm_rl.algorithms.kl import KLPenalty, kl_estimate
from mindspeed_mm_rl.types import LossInput

# e^20 = 4.9e8: far outside every clip range, yet its gradient stays finite in float32.
_MAX_LOG_RATIO = 20.0

SurrogateName = Literal["token_ratio", "sequence_ratio", "clipped_weight"]


@dataclass(frozen=True)
class PolicyLossSettings:
    """Example: PolicyLossSettings(clip_ratio_low=0.2, clip_ratio_high=0.28)."""

    clip_ratio_low: float
    clip_ratio_high: float
    token_level_loss: bool = True
    """True: every token of the mini-batch weighs the same (DAPO); False: every sequence does."""
    loss_length: int = 0
    """Above 0: every sequence's sum is divided by this constant, then averaged over sequences (Dr. GRPO), whatever token_level_loss is."""
    surrogate: SurrogateName = "token_ratio"
    """token_ratio: PPO's; sequence_ratio: GSPO's; clipped_weight: CISPO's."""
    kl_penalty: KLPenalty = "low_var_kl"
    kl_coef: float = 0.0
    """0 = no KL term, and reference log-probs may be None."""
    entropy_coeff: float = 0.0
    rollout_is_cap: float = 0.0
    """Cap of the truncated importance weight exp(old - rollout); 0 = off."""


def token_weights(x: LossInput, settings: PolicyLossSettings) -> torch.Tensor:
    """[T] share of each token in the mini-batch mean: mask / num_loss_tokens, or mask / (tokens of its sequence * num_sequences), or
    mask / (loss_length * num_sequences).

    A sequence must lie in one micro-batch whole; it then has the same weight however the mini-batch is cut.
    """
    mask = x.loss_mask.float()
    if settings.loss_length > 0:
        return mask / (settings.loss_length * x.num_sequences)
    if settings.token_level_loss:
        return mask / x.num_loss_tokens
    return mask / (_sum_over_sequence(mask, x).clamp(min=1.0) * x.num_sequences)


def clipped_policy_loss(x: LossInput, settings: PolicyLossSettings) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The surrogate that the settings name, a KL term and an entropy bonus.

    loss = mean surrogate * w + kl_coef * mean KL - entropy_coeff * mean entropy, w = min(exp(old - rollout), rollout_is_cap) or 1;
    what "mean" is, token_weights says.

    Returns the loss (scalar, with gradient) and detached metrics. `pg_loss` is averaged as the loss is, all others over tokens;
    `kl_loss` is there whenever reference log-probs are, also when the KL term is in the reward.

    Raises:
        ValueError: kl_coef is not 0 but there are no reference log-probs.
    """
    inside = x.loss_mask > 0
    token_mean = x.loss_mask.float() / x.num_loss_tokens
    weights = token_weights(x, settings)
    log_ratio = _difference(x.logprobs, x.old_logprobs, inside)
    surrogate, clipped, ratio = _SURROGATES[settings.surrogate](log_ratio, x, settings)
    if settings.rollout_is_cap > 0:
        importance = _difference(x.old_logprobs, x.rollout_logprobs, inside).exp().clamp(max=settings.rollout_is_cap).detach()
        surrogate = surrogate * importance
    pg_loss = _weighted(surrogate, weights, inside)
    entropy = x.entropy.float()
    metrics = {
        "pg_loss": pg_loss,
        "entropy": _weighted(entropy, token_mean, inside),
        "pg_clipfrac": _weighted(clipped.float(), token_mean, inside),
        "ppo_kl": _weighted(-log_ratio, token_mean, inside),
        "ratio_mean": _weighted(ratio, token_mean, inside),
    }
    loss = pg_loss
    if settings.rollout_is_cap > 0:
        metrics["rollout_is_weight"] = _weighted(importance, token_mean, inside)
    if settings.kl_coef != 0.0 or x.ref_logprobs is not None:
        kl = _reference_kl(x, inside, settings.kl_penalty)
        metrics["kl_loss"] = _weighted(kl, token_mean, inside)
    if settings.kl_coef != 0.0:
        loss = loss + settings.kl_coef * _weighted(kl, weights, inside)
    if settings.entropy_coeff != 0.0:
        loss = loss - settings.entropy_coeff * _weighted(entropy, weights, inside)
    return loss, {name: value.detach() for name, value in metrics.items()}


def _token_ratio(log_ratio: torch.Tensor, x: LossInput, settings: PolicyLossSettings) -> tuple[torch.Tensor, ...]:
    """max(-A r, -A clip(r, 1 - low, 1 + high)) with r_t = exp(logprob - old) (PPO, arXiv 1707.06347, eq. 7), separate bounds
    (DAPO, arXiv 2503.14476, eq. 8). Returns [T] loss, where the clipped branch won, and the ratio."""
    ratio = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    return *_pessimistic(ratio, x, settings), ratio


def _sequence_ratio(log_ratio: torch.Tensor, x: LossInput, settings: PolicyLossSettings) -> tuple[torch.Tensor, ...]:
    """The same with one ratio per response, s = exp(mean over its tokens of logprob - old) (GSPO, arXiv 2507.18071, eq. 5 to 7).

    The paper's bounds are 3e-4 and 4e-4. A sequence must lie in one micro-batch whole.
    """
    tokens = _sum_over_sequence(x.loss_mask.float(), x).clamp(min=1.0)
    ratio = (_sum_over_sequence(log_ratio * x.loss_mask, x) / tokens).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    return *_pessimistic(ratio, x, settings), ratio


def _clipped_weight(log_ratio: torch.Tensor, x: LossInput, settings: PolicyLossSettings) -> tuple[torch.Tensor, ...]:
    """-A w logprob, w = clip(r, 1 - low, 1 + high) without gradient (CISPO, MiniMax-M1, arXiv 2506.13585, eq. 4 and 5): what is clipped
    is the weight, so that no token loses its gradient. The paper has no lower bound: clip_ratio_low 1."""
    inside = x.loss_mask > 0
    ratio = log_ratio.detach().clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    weight = ratio.clamp(1.0 - settings.clip_ratio_low, 1.0 + settings.clip_ratio_high)
    return -_kept(x.advantages, inside) * weight * _kept(x.logprobs, inside), weight != ratio, ratio


_SURROGATES: dict[str, Callable[[torch.Tensor, LossInput, PolicyLossSettings], tuple[torch.Tensor, ...]]] = {
    "token_ratio": _token_ratio,
    "sequence_ratio": _sequence_ratio,
    "clipped_weight": _clipped_weight,
}


def _pessimistic(ratio: torch.Tensor, x: LossInput, settings: PolicyLossSettings) -> tuple[torch.Tensor, torch.Tensor]:
    advantages = _kept(x.advantages, x.loss_mask > 0)
    free = -advantages * ratio
    bounded = -advantages * ratio.clamp(1.0 - settings.clip_ratio_low, 1.0 + settings.clip_ratio_high)
    return torch.maximum(free, bounded), (bounded > free).detach()


def _sum_over_sequence(values: torch.Tensor, x: LossInput) -> torch.Tensor:
    """[T] the sum of `values` over the sequence that each token belongs to."""
    # index_add rather than bincount, which has no deterministic kernel on CUDA.
    num_rows = int(x.sequence_index.max()) + 1 if len(values) else 0
    return values.new_zeros(num_rows).index_add(0, x.sequence_index, values)[x.sequence_index]


def _reference_kl(x: LossInput, inside: torch.Tensor, kind: KLPenalty) -> torch.Tensor:
    if x.ref_logprobs is None:
        raise ValueError("the KL coefficient is not 0, but the batch has no reference log-probs: the recipe must set needs_reference")
    return kl_estimate(_kept(x.logprobs, inside), _kept(x.ref_logprobs, inside), kind)


def _kept(values: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """In float32 (bfloat16 would lose every small ratio), exactly 0 outside the mask whatever stands there."""
    return torch.where(inside, values.float(), torch.zeros((), dtype=torch.float32, device=values.device))


def _difference(left: torch.Tensor, right: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    return _kept(left, inside) - _kept(right, inside)


def _weighted(values: torch.Tensor, weights: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    # where() rather than the weight alone: nan * 0 is nan.
    return (torch.where(inside, values, torch.zeros_like(values)) * weights).sum()


@dataclass(frozen=True)
class ValueLossInput:
    """All a value loss may look at, for the response tokens of one micro-batch, flat [T]."""

    values: torch.Tensor
    """[T], with gradient"""
    old_values: torch.Tensor
    """What the critic said before its first update on this batch."""
    returns: torch.Tensor
    loss_mask: torch.Tensor
    """[T], 0.0 or 1.0"""
    num_loss_tokens: float
    """Sum of loss_mask over the global mini-batch."""


@dataclass(frozen=True)
class ValueLossSettings:
    """Example: ValueLossSettings(cliprange_value=0.5)."""

    cliprange_value: float = 0.5
    """How far a value may move from the old one before it stops to pay; 0 = no bound."""


def clipped_value_loss(x: ValueLossInput, settings: ValueLossSettings) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """mean over tokens of max((V - R)^2, (clip(V, old - c, old + c) - R)^2) / 2 (PPO's released code; arXiv 2005.12729, section 3).

    Returns the loss (scalar, with gradient) and detached metrics; `vf_clipfrac` is the share of tokens where the clipped branch won.
    """
    inside = x.loss_mask > 0
    token_mean = x.loss_mask.float() / x.num_loss_tokens
    values, old, returns = (_kept(column, inside) for column in (x.values, x.old_values, x.returns))
    bound = settings.cliprange_value or float("inf")
    free = (values - returns).square()
    bounded = (torch.clamp(values, old - bound, old + bound) - returns).square()
    loss = _weighted(torch.maximum(free, bounded), token_mean, inside) / 2.0
    clipfrac = _weighted((bounded > free).float(), token_mean, inside)
    return loss, {"vf_loss": loss.detach(), "vf_clipfrac": clipfrac.detach(), "values_mean": _weighted(values.detach(), token_mean, inside)}
