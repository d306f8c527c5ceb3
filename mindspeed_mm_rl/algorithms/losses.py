"""Policy losses: functions of LossInput that return sums already divided by global denominators."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mindspeed_mm_rl.algorithms.kl import KLPenalty, kl_estimate
from mindspeed_mm_rl.types import LossInput

# e^20 = 4.9e8: far outside every clip range, yet its gradient stays finite in float32.
_MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class PolicyLossSettings:
    """Example: PolicyLossSettings(clip_ratio_low=0.2, clip_ratio_high=0.28)."""

    clip_ratio_low: float
    clip_ratio_high: float
    token_level_loss: bool = True
    """True: every token of the mini-batch weighs the same (DAPO); False: every sequence does."""
    kl_penalty: KLPenalty = "low_var_kl"
    kl_coef: float = 0.0
    """0 = no KL term, and reference log-probs may be None."""
    entropy_coeff: float = 0.0
    rollout_is_cap: float = 0.0
    """Cap of the truncated importance weight exp(old - rollout); 0 = off."""


def token_weights(x: LossInput, token_level_loss: bool) -> torch.Tensor:
    """[T] share of each token in the mini-batch mean: mask / num_loss_tokens, or mask / (tokens of its sequence * num_sequences).

    A sequence must lie in one micro-batch whole; it then has the same weight however the mini-batch is cut.
    """
    mask = x.loss_mask.float()
    if token_level_loss:
        return mask / x.num_loss_tokens
    # index_add_ rather than bincount, which has no deterministic kernel on CUDA.
    num_rows = int(x.sequence_index.max()) + 1 if len(mask) else 0
    tokens_of_sequence = mask.new_zeros(num_rows).index_add_(0, x.sequence_index, mask).clamp(min=1.0)
    return mask / (tokens_of_sequence[x.sequence_index] * x.num_sequences)


def clipped_policy_loss(x: LossInput, settings: PolicyLossSettings) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped surrogate (PPO, arXiv 1707.06347, eq. 7) with separate bounds (DAPO, arXiv 2503.14476, eq. 8), KL term and entropy bonus.

    loss = mean max(-A r, -A clip(r, 1 - low, 1 + high)) * w + kl_coef * mean KL - entropy_coeff * mean entropy,
    r = exp(logprobs - old), w = min(exp(old - rollout), rollout_is_cap) or 1.

    Returns the loss (scalar, with gradient) and detached metrics. `pg_loss` is averaged as the loss is, all others over tokens.

    Raises:
        ValueError: kl_coef is not 0 but there are no reference log-probs.
    """
    inside = x.loss_mask > 0
    token_mean = x.loss_mask.float() / x.num_loss_tokens
    weights = token_weights(x, settings.token_level_loss)
    log_ratio = _difference(x.logprobs, x.old_logprobs, inside)
    ratio = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    surrogate, clipped = _surrogate(ratio, x.advantages.float(), settings)
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
    if settings.kl_coef != 0.0:
        kl = _reference_kl(x, inside, settings.kl_penalty)
        metrics["kl_loss"] = _weighted(kl, token_mean, inside)
        loss = loss + settings.kl_coef * _weighted(kl, weights, inside)
    if settings.entropy_coeff != 0.0:
        loss = loss - settings.entropy_coeff * _weighted(entropy, weights, inside)
    return loss, {name: value.detach() for name, value in metrics.items()}


def _surrogate(ratio: torch.Tensor, advantages: torch.Tensor, settings: PolicyLossSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """[T] pessimistic surrogate loss, and where the clipped branch won."""
    free = -advantages * ratio
    bounded = -advantages * ratio.clamp(1.0 - settings.clip_ratio_low, 1.0 + settings.clip_ratio_high)
    return torch.maximum(free, bounded), (bounded > free).detach()


def _reference_kl(x: LossInput, inside: torch.Tensor, kind: KLPenalty) -> torch.Tensor:
    if x.ref_logprobs is None:
        raise ValueError("the KL coefficient is not 0, but the batch has no reference log-probs: the recipe must set needs_reference")
    zero = torch.zeros((), dtype=torch.float32, device=x.logprobs.device)
    return kl_estimate(torch.where(inside, x.logprobs.float(), zero), torch.where(inside, x.ref_logprobs.float(), zero), kind)


def _difference(left: torch.Tensor, right: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """left - right in float32 (bfloat16 would lose every small ratio), exactly 0 outside the mask whatever stands there."""
    zero = torch.zeros((), dtype=torch.float32, device=left.device)
    return torch.where(inside, left.float(), zero) - torch.where(inside, right.float(), zero)


def _weighted(values: torch.Tensor, weights: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    # where() rather than the weight alone: nan * 0 is nan.
    return (torch.where(inside, values, torch.zeros_like(values)) * weights).sum()
