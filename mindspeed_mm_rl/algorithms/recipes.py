"""An algorithm is a Recipe: the parts that the training iteration puts together without asking for its name.

What sets an algorithm apart is a row of ALGORITHMS; clip bounds, KL terms and filters are settings of any of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from mindspeed_mm_rl.algorithms.advantages import (
    GroupEstimate,
    gae,
    group_advantages,
    group_centred,
    group_normalised,
    leave_one_out,
    reward_to_go,
    token_rewards,
    whitened,
)
from mindspeed_mm_rl.algorithms.filters import has_spread, metric_name
from mindspeed_mm_rl.algorithms.kl import KLController, KLPenalty, token_kl
from mindspeed_mm_rl.algorithms.losses import (
    PolicyLossSettings,
    SurrogateName,
    ValueLossInput,
    ValueLossSettings,
    clipped_policy_loss,
    clipped_value_loss,
)
from mindspeed_mm_rl.types import Batch, Group, LossInput, Ragged

PolicyLoss = Callable[[LossInput], tuple[torch.Tensor, dict[str, torch.Tensor]]]
ValueLoss = Callable[[ValueLossInput], tuple[torch.Tensor, dict[str, torch.Tensor]]]
AlgorithmName = Literal["grpo", "dapo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gspo", "cispo", "ppo"]


@dataclass(frozen=True)
class RecipeSettings:
    """Field for field the recipe part of a run's plan. Example: make_recipe(RecipeSettings(**dataclasses.asdict(plan.recipe)))."""

    algorithm: AlgorithmName
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
    loss_length: int = 0
    """Above 0: every response's sum is divided by this constant instead of a number of tokens; Dr. GRPO needs it."""
    use_kl_in_reward: bool = False
    """True: the KL term is taken off the reward, token by token, and not part of the loss. RLOO and REINFORCE++ always have it there."""
    gamma: float = 1.0
    lam: float = 0.95
    advantage_whiten: bool = True
    """PPO: normalise GAE's advantages over the tokens of the batch."""
    cliprange_value: float = 0.5


@dataclass(frozen=True)
class Credit:
    """What the samples of a batch have earned, one value per response token."""

    advantages: Ragged
    returns: Ragged | None = None
    """What the critic learns."""


@dataclass(frozen=True)
class Algorithm:
    """What a name stands for."""

    credit: Callable[[Batch, Ragged | None, RecipeSettings], Credit]
    """(batch, KL cost per token or None, settings) -> advantages."""
    surrogate: SurrogateName = "token_ratio"
    mean: Literal["settings", "sequences", "constant"] = "settings"
    """How the loss is averaged: as token_level_loss says, over sequences, or over sequences of one constant length."""
    kl_in_reward: bool = False
    needs_critic: bool = False


def _of_group(batch: Batch, penalty: Ragged | None, settings: RecipeSettings, estimate: GroupEstimate = group_normalised) -> Credit:
    return Credit(group_advantages(batch, penalty, estimate))


def _reinforce_plus_plus(batch: Batch, penalty: Ragged | None, settings: RecipeSettings) -> Credit:
    return Credit(whitened(reward_to_go(token_rewards(batch, penalty), batch.loss_mask, settings.gamma), batch.loss_mask))


def _reinforce_plus_plus_baseline(batch: Batch, penalty: Ragged | None, settings: RecipeSettings) -> Credit:
    return Credit(whitened(group_advantages(batch, penalty, group_centred), batch.loss_mask))


def _with_critic(batch: Batch, penalty: Ragged | None, settings: RecipeSettings) -> Credit:
    if batch.values is None:
        raise ValueError("the advantages of ppo need the critic's values, but the batch has none: the critic must run before them")
    advantages, returns = gae(token_rewards(batch, penalty), batch.values, batch.loss_mask, settings.gamma, settings.lam)
    return Credit(whitened(advantages, batch.loss_mask) if settings.advantage_whiten else advantages, returns)


ALGORITHMS: dict[str, Algorithm] = {
    # arXiv 2402.03300, and arXiv 2503.14476: the same parts with other clip bounds, KL coefficient, filter and mean.
    "grpo": Algorithm(_of_group),
    "dapo": Algorithm(_of_group),
    # arXiv 2503.20783: neither the std of a group nor the length of a response weighs a sample.
    "dr_grpo": Algorithm(partial(_of_group, estimate=group_centred), mean="constant"),
    # arXiv 2402.14740. Its gradient is that of log p(response), a sum: exactly so with loss_length, otherwise a mean over tokens.
    "rloo": Algorithm(partial(_of_group, estimate=leave_one_out), kl_in_reward=True),
    # arXiv 2501.03262: reward less the KL terms still to come, normalised over the whole batch; the second compares within groups first
    # and has its KL term (kl_penalty mse) in the loss.
    "reinforce_plus_plus": Algorithm(_reinforce_plus_plus, kl_in_reward=True),
    "reinforce_plus_plus_baseline": Algorithm(_reinforce_plus_plus_baseline),
    # arXiv 2507.18071: a ratio per response, so a mean over responses.
    "gspo": Algorithm(_of_group, surrogate="sequence_ratio", mean="sequences"),
    # arXiv 2506.13585.
    "cispo": Algorithm(_of_group, surrogate="clipped_weight"),
    # arXiv 1707.06347, arXiv 1506.02438.
    "ppo": Algorithm(_with_critic, needs_critic=True),
}


@dataclass(frozen=True)
class Recipe:
    """Everything an iteration needs to know of an algorithm. All parts are picklable."""

    name: str
    policy_loss: Callable[[float], PolicyLoss]
    """KL coefficient of this iteration -> the loss that is sent to the train engine."""
    with_advantages: Callable[[Batch, float], Batch]
    """(batch, KL coefficient of this iteration) -> the batch with `advantages` and, where there is a critic, `returns`."""
    needs_reference: bool
    needs_old_logprobs: bool
    """True: the batch must have them before the advantages, even when a run is on-policy."""
    kl_in_reward: bool
    """True: the KL term is taken off the rewards and not part of the loss."""
    needs_entropy_grad: bool
    """True: LossInput.entropy must carry a gradient."""
    needs_critic: bool = False
    value_loss: ValueLoss | None = None
    """What is sent to the critic's engine."""
    group_filter: Callable[[Group], bool] | None = None
    """True = train on this group; None = on all."""


def make_recipe(settings: RecipeSettings) -> Recipe:
    """The parts of `settings.algorithm`.

    Raises:
        ValueError: no such algorithm, or one that lacks a setting.
    """
    algorithm = _algorithm(settings)
    kl_in_reward = settings.kl_coef != 0.0 and (algorithm.kl_in_reward or settings.use_kl_in_reward)
    loss_settings = PolicyLossSettings(
        clip_ratio_low=settings.clip_ratio_low,
        clip_ratio_high=settings.clip_ratio_high,
        token_level_loss=settings.token_level_loss and algorithm.mean != "sequences",
        loss_length=0 if algorithm.mean == "sequences" else settings.loss_length,
        surrogate=algorithm.surrogate,
        kl_penalty=settings.kl_penalty,
        entropy_coeff=settings.entropy_coeff,
        rollout_is_cap=settings.rollout_is_cap,
    )
    return Recipe(
        name=settings.algorithm,
        policy_loss=partial(_loss_without_kl if kl_in_reward else _loss_with_kl, loss_settings),
        with_advantages=partial(_credited, algorithm.credit, settings, kl_in_reward),
        needs_reference=settings.kl_coef != 0.0,
        needs_old_logprobs=kl_in_reward,
        kl_in_reward=kl_in_reward,
        needs_entropy_grad=settings.entropy_coeff != 0.0,
        needs_critic=algorithm.needs_critic,
        value_loss=partial(clipped_value_loss, settings=ValueLossSettings(settings.cliprange_value)) if algorithm.needs_critic else None,
        group_filter=partial(has_spread, metric=metric_name(settings.filter_metric)) if settings.filter_groups else None,
    )


def make_kl_controller(settings: RecipeSettings) -> KLController:
    return KLController(settings.kl_coef, settings.kl_ctrl_type == "adaptive", settings.kl_target, settings.kl_horizon)


def _algorithm(settings: RecipeSettings) -> Algorithm:
    if settings.algorithm not in ALGORITHMS:
        nearest = difflib.get_close_matches(settings.algorithm, ALGORITHMS, n=1, cutoff=0.0)[0]
        raise ValueError(f"algorithm {settings.algorithm!r} is not offered; the nearest is {nearest!r} of {', '.join(ALGORITHMS)}")
    algorithm = ALGORITHMS[settings.algorithm]
    if algorithm.mean == "constant" and settings.loss_length <= 0:
        raise ValueError(
            f"{settings.algorithm} divides every response's sum by one constant, so loss_length ({settings.loss_length}) must be above 0; "
            "take the largest number of response tokens, generate_config.sampling_config.max_tokens"
        )
    return algorithm


def _credited(
    credit: Callable[[Batch, Ragged | None, RecipeSettings], Credit],
    settings: RecipeSettings,
    kl_in_reward: bool,
    batch: Batch,
    kl_coef: float,
) -> Batch:
    penalty = None
    if kl_in_reward:
        kl = token_kl(batch, settings.kl_penalty)
        penalty = Ragged(kl.values * kl_coef, kl.lengths)
    earned = credit(batch, penalty, settings)
    return replace(batch, advantages=earned.advantages, returns=earned.returns)


def _loss_with_kl(settings: PolicyLossSettings, kl_coef: float) -> PolicyLoss:
    return partial(clipped_policy_loss, settings=replace(settings, kl_coef=kl_coef))


def _loss_without_kl(settings: PolicyLossSettings, kl_coef: float) -> PolicyLoss:
    return partial(clipped_policy_loss, settings=settings)
