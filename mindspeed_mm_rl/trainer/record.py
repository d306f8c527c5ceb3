"""What an iteration says of itself, under the names that users of the reference system know."""

from __future__ import annotations

from collections.abc import Sequence

from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.metrics import Metric, Stopwatch, TokenCounts, distribution, iteration_record, reduce
from mindspeed_mm_rl.trainer.collect import Collected
from mindspeed_mm_rl.types import Batch

_UPDATE_METRICS = {
    "actor/entropy": "entropy",
    "actor/kl_loss": "kl_loss",
    "actor/pg_loss": "pg_loss",
    "actor/pg_clipfrac": "pg_clipfrac",
    "actor/ppo_kl": "ppo_kl",
    "actor/grad_norm": "grad_norm",
    "rollout/logprob_gap/mean": "logprob_gap_mean",
}
"""Metric name -> what an update calls it; averaged over the iteration's updates by samples, 0 where an update has no such term."""


def record_of(
    plan: Plan, collected: Collected, batch: Batch, updates: Sequence[tuple[int, dict[str, float]]], clock: Stopwatch
) -> dict[str, float]:
    """updates: (samples, metrics) of each optimizer step, in order."""
    algorithm = plan.recipe.algorithm
    values = _of_updates(updates) | _of_rollout(collected, algorithm) | distribution(f"{algorithm}/score", batch.rewards)
    values["train/num_samples"] = float(len(batch))
    counts = TokenCounts(
        prompt_lengths=batch.prompts.lengths,
        response_lengths=batch.responses.lengths,
        generated_samples=plan.run.prompts_per_generation * plan.run.samples_per_prompt * collected.num_gen_batches,
        trained_samples=len(batch),
        num_devices=plan.run.num_devices,
        use_max_lengths=plan.run.log_max_throughput,
    )
    return iteration_record(algorithm, values, clock, counts)


def _of_updates(updates: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
    values = reduce({name: Metric(m.get(own, 0.0), "mean", n) for name, own in _UPDATE_METRICS.items()} for n, m in updates)
    return values | {
        "actor/lr": updates[-1][1]["lr"],
        "rollout/logprob_gap/max": max(metrics["logprob_gap_max"] for _, metrics in updates),
        "train/num_updates": float(len(updates)),
    }


def _of_rollout(collected: Collected, algorithm: str) -> dict[str, float]:
    """Over every sample that was generated, also those that dynamic sampling dropped."""
    groups = collected.generated
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    values = {f"{name}_rewards/mean": _mean([score for group in groups for score in group.scores[name]]) for name in groups[0].scores}
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
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
