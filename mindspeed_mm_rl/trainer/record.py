"""What an iteration says of itself, under the names that users of the reference system know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mindspeed_mm_rl.algorithms.advantages import explained_variance
from mindspeed_mm_rl.algorithms.kl import mean_token_kl
from mindspeed_mm_rl.algorithms.recipes import Recipe
from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.metrics import Metric, Stopwatch, TokenCounts, distribution, iteration_record, reduce
from mindspeed_mm_rl.trainer.collect import Collected
from mindspeed_mm_rl.types import Batch, Group

_ACTOR_METRICS = {
    "actor/entropy": "entropy",
    "actor/kl_loss": "kl_loss",
    "actor/pg_loss": "pg_loss",
    "actor/pg_clipfrac": "pg_clipfrac",
    "actor/ppo_kl": "ppo_kl",
    "actor/grad_norm": "grad_norm",
    "rollout/logprob_gap/mean": "logprob_gap_mean",
}
"""Metric name -> what an update calls it; averaged over the iteration's updates by samples, 0 where an update has no such term."""
_CRITIC_METRICS = {
    "critic/vf_loss": "vf_loss",
    "critic/vf_clipfrac": "vf_clipfrac",
    "critic/values_mean": "values_mean",
    "critic/grad_norm": "grad_norm",
}
"""The same of the critic's updates."""

Update = tuple[int, dict[str, float]]
"""(samples, metrics) of an optimizer step."""


@dataclass
class Updates:
    """Of one iteration, in order."""

    actor: list[Update] = field(default_factory=list)
    critic: list[Update] = field(default_factory=list)


def record_of(plan: Plan, recipe: Recipe, collected: Collected, batch: Batch, updates: Updates, clock: Stopwatch) -> dict[str, float]:
    algorithm = plan.recipe.algorithm
    values = _of_actor(updates.actor) | _of_critic(batch, updates.critic) | _of_rollout(collected, algorithm)
    values |= distribution(f"{algorithm}/score", batch.rewards)
    values["train/num_samples"] = float(len(batch))
    values["actor/kl_in_reward"] = mean_token_kl(batch, plan.recipe.kl_penalty) if recipe.kl_in_reward else 0.0
    counts = TokenCounts(
        prompt_lengths=batch.prompts.lengths,
        response_lengths=batch.responses.lengths,
        generated_samples=plan.run.prompts_per_generation * plan.run.samples_per_prompt * collected.num_gen_batches,
        trained_samples=len(batch),
        num_devices=plan.run.num_devices,
        use_max_lengths=plan.run.log_max_throughput,
    )
    return iteration_record(algorithm, values, clock, counts)


def _means(names: dict[str, str], updates: Sequence[Update]) -> dict[str, float]:
    return dict.fromkeys(names, 0.0) | reduce({name: Metric(m.get(own, 0.0), "mean", n) for name, own in names.items()} for n, m in updates)


def _of_actor(updates: Sequence[Update]) -> dict[str, float]:
    """Nothing is measured, so nothing is said, while the critic warms up alone."""
    if not updates:
        return {"train/num_updates": 0.0}
    return _means(_ACTOR_METRICS, updates) | {
        "actor/lr": updates[-1][1]["lr"],
        "rollout/logprob_gap/max": max(metrics["logprob_gap_max"] for _, metrics in updates),
        "train/num_updates": float(len(updates)),
    }


def _of_critic(batch: Batch, updates: Sequence[Update]) -> dict[str, float]:
    """Nothing without a critic. Values are those before the first update on the batch, per response token that is trained on."""
    if not updates:
        return {}
    inside = batch.loss_mask.values > 0
    columns = {"values": batch.values, "returns": batch.returns, "advantages": batch.advantages}
    per_token = [distribution(f"critic/{name}", column.values[inside].tolist()) for name, column in columns.items()]
    record = {name: value for values in per_token for name, value in values.items()}
    record |= distribution("critic/score", batch.rewards) | distribution("critic/rewards", batch.rewards)
    return (
        record
        | _means(_CRITIC_METRICS, updates)
        | {
            "critic/lr": updates[-1][1]["lr"],
            "critic/explained_variance": explained_variance(batch.values, batch.returns, batch.loss_mask),
        }
    )


def _of_rollout(collected: Collected, algorithm: str) -> dict[str, float]:
    """Over every sample that was generated, also those that dynamic sampling dropped."""
    groups = collected.generated
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    values = _of_verifiers(groups)
    # Every sample is a single turn without tools.
    values |= distribution("tool_call_num", [0.0])
    return values | {
        f"{algorithm}/accuracy/mean": _mean([value for group in groups for value in group.accuracy]),
        "rollout/reward/mean": _mean([reward for group in groups for reward in group.rewards]),
        "rollout/truncated_ratio": _mean([float(rollout.finish == "length") for rollout in rollouts]),
        "train/num_gen_batches": float(collected.num_gen_batches),
        "train/filtered_groups": float(collected.num_filtered),
        "train/surplus_groups": float(collected.num_surplus),
        "rewards/timeouts": float(collected.num_reward_timeouts),
        "rewards/crashes": float(collected.num_reward_crashes),
        "vision/images": float(collected.num_pictures),
        "vision/images_encoded": float(collected.num_encoded_pictures),
    }


def _of_verifiers(groups: Sequence[Group]) -> dict[str, float]:
    """Means over the samples that a verifier was asked about; none for a verifier of a source that had no sample."""
    columns: dict[str, list[float]] = {}
    for group in groups:
        for name, values in (*group.scores.items(), *group.metrics.items()):
            columns.setdefault(name, []).extend(values)
    return {f"{name}_rewards/mean": _mean(column) for name, column in columns.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
