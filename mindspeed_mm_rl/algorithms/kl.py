"""Estimates of the divergence from the reference policy, and the controllers of its coefficient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from mindspeed_mm_rl.types import Batch, Ragged

KLPenalty = Literal["kl", "abs", "mse", "low_var_kl"]

# exp() of a larger difference overflows float32 soon after; the estimate itself is bounded at LOW_VAR_BOUND.
_MAX_LOG_RATIO = 20.0
_LOW_VAR_BOUND = 10.0
# Ziegler et al. 2019 (arXiv 1909.08593), section 2.2: the proportional error is clipped before it acts.
_MAX_RELATIVE_ERROR = 0.2


def _low_variance(difference: torch.Tensor) -> torch.Tensor:
    log_ratio = (-difference).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return (log_ratio.exp() - log_ratio - 1.0).clamp(-_LOW_VAR_BOUND, _LOW_VAR_BOUND)


_ESTIMATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "kl": lambda difference: difference,
    "abs": torch.abs,
    "mse": lambda difference: difference.square() / 2.0,
    "low_var_kl": _low_variance,
}


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, kind: KLPenalty) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) from sampled tokens, shaped as `logprobs` (Schulman, "Approximating KL divergence").

    With d = logprobs - ref_logprobs: kl = d (k1), abs = |d|, mse = d^2 / 2 (k2), low_var_kl = e^-d + d - 1 (k3).

    Raises:
        ValueError: `kind` is none of these.
    """
    if kind not in _ESTIMATES:
        raise ValueError(f"rl_config.kl_penalty is {kind!r}; it must be one of {', '.join(_ESTIMATES)}")
    return _ESTIMATES[kind](logprobs - ref_logprobs)


def token_kl(batch: Batch, kind: KLPenalty) -> Ragged:
    """Per-token estimate of KL(policy that sampled || reference), 0 outside the loss mask; for a KL term inside the reward.

    Raises:
        ValueError: the batch has no old or no reference log-probs.
    """
    if batch.old_logprobs is None or batch.ref_logprobs is None:
        raise ValueError("a KL term in the reward needs the batch's old and reference log-probs: fill both columns before the advantages")
    estimate = kl_estimate(batch.old_logprobs.values.double(), batch.ref_logprobs.values.double(), kind)
    return Ragged(torch.where(batch.loss_mask.values > 0, estimate, 0.0), batch.loss_mask.lengths)


def mean_token_kl(batch: Batch, kind: KLPenalty) -> float:
    """Mean of `token_kl` over the tokens inside the loss mask."""
    return float(token_kl(batch, kind).values.sum() / batch.loss_mask.values.sum())


@dataclass
class KLController:
    """Holds the KL coefficient of a run; with `adaptive` it is steered so that the measured KL stays near `target` nats per token.

    Example: KLController(coef=0.01, adaptive=True, target=0.1, horizon=1000.0)
    """

    coef: float
    adaptive: bool = False
    target: float = 0.0
    horizon: float = 0.0
    """Samples after which a constant relative error of 1 would have doubled the coefficient; an iteration with more counts as this many."""

    def __post_init__(self) -> None:
        if self.adaptive and (self.target <= 0 or self.horizon <= 0):
            raise ValueError(
                "rl_config.kl_ctrl_type adaptive needs rl_config.kl_target and rl_config.kl_horizon above 0, "
                f"but they are {self.target} and {self.horizon}"
            )

    def update(self, measured_kl: float, num_samples: int) -> None:
        """After an iteration that trained on `num_samples` sequences with the mean KL `measured_kl`."""
        if not self.adaptive:
            return
        error = min(max(measured_kl / self.target - 1.0, -_MAX_RELATIVE_ERROR), _MAX_RELATIVE_ERROR)
        # An iteration of five horizons would make the coefficient negative, which drives the policy away from the reference.
        self.coef *= 1.0 + error * min(num_samples / self.horizon, 1.0)

    def state(self) -> dict[str, float]:
        """What a save must keep; plain numbers."""
        return {"coef": self.coef}

    def load_state(self, state: dict[str, float]) -> None:
        """A fixed controller keeps the configured coefficient: a user may change it on resume, and switch the term on or off."""
        if self.adaptive and self.coef and state["coef"]:
            self.coef = float(state["coef"])
