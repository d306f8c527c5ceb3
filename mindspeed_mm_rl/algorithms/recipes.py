"""An algorithm is a Recipe: the parts that the training iteration puts together without asking for its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from mindspeed_mm_rl.algorithms.advantages import group_advantages
from mindspeed_mm_rl.algorithms.filters import has_spread, metric_name
from mindspeed_mm_rl.algorithms.kl import KLController, KLPenalty
from mindspeed_mm_rl.algorithms.losses import PolicyLossSettings, clipped_policy_loss
from mindspeed_mm_rl.types import Batch, Group, LossInput, Ragged

PolicyLoss = Callable[[LossInput], tuple[torch.Tensor, dict[str, torch.Tensor]]]


@dataclass(frozen=True)
class RecipeSettings:
    """Field for field the recipe part of a run's plan. Example: make_recipe(RecipeSettings(**dataclasses.asdict(plan.recipe)))."""

    algorithm: Literal["grpo", "dapo"]
    clip_ratio_low: float
    clip_ratio_high: float
    token_level_loss: bool
    kl_penalty: KLPenalty
    kl_coef: float
    """0 = no KL term and no reference model."""
    kl_ctrl_type: Literal["fixed", "adaptive"]
    kl_target: float
    kl_horizon: float
    entropy_coeff: float
    rollout_is_cap: float
    filter_groups: bool
    filter_metric: str
    filter_max_batches: int
    train_prompts: int


@dataclass(frozen=True)
class Recipe:
    """Everything an iteration needs to know of an algorithm. All parts are picklable."""

    name: str
    policy_loss: Callable[[float], PolicyLoss]
    """KL coefficient of this iteration -> the loss that is sent to the train engine."""
    advantages: Callable[[Batch], Ragged]
    """One value per response token; for Batch.advantages."""
    needs_reference: bool
    needs_entropy_grad: bool
    """True: LossInput.entropy must carry a gradient."""
    needs_critic: bool = False
    group_filter: Callable[[Group], bool] | None = None
    """True = train on this group; None = on all."""


def make_recipe(settings: RecipeSettings) -> Recipe:
    """GRPO (arXiv 2402.03300) and DAPO (arXiv 2503.14476) differ in values alone: clip bounds, loss level, KL, group filter."""
    loss_settings = PolicyLossSettings(
        clip_ratio_low=settings.clip_ratio_low,
        clip_ratio_high=settings.clip_ratio_high,
        token_level_loss=settings.token_level_loss,
        kl_penalty=settings.kl_penalty,
        entropy_coeff=settings.entropy_coeff,
        rollout_is_cap=settings.rollout_is_cap,
    )
    return Recipe(
        name=settings.algorithm,
        policy_loss=partial(_clipped_loss, loss_settings),
        advantages=group_advantages,
        needs_reference=settings.kl_coef != 0.0,
        needs_entropy_grad=settings.entropy_coeff != 0.0,
        group_filter=partial(has_spread, metric=metric_name(settings.filter_metric)) if settings.filter_groups else None,
    )


def make_kl_controller(settings: RecipeSettings) -> KLController:
    return KLController(settings.kl_coef, settings.kl_ctrl_type == "adaptive", settings.kl_target, settings.kl_horizon)


def _clipped_loss(settings: PolicyLossSettings, kl_coef: float) -> PolicyLoss:
    return partial(clipped_policy_loss, settings=replace(settings, kl_coef=kl_coef))
