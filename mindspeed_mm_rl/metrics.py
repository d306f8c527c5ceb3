"""Metrics of one iteration: values that carry their reduction, a stopwatch of phases, and the names that users know.

    workers  --{name: Metric}-->  reduce()  --\
    phases   --Stopwatch-------------------->  iteration_record()  -->  sinks.MetricLog.record(step, record)
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

Reduction = Literal["mean", "sum", "max", "min"]
Interval = tuple[float, float]

PHASES = (
    "all", "update", "rollout", "old_log_p", "reference_model", "resharding_to_infer", "resharding_to_train", "adv", "rule_reward",
    "reward_model", "ref_onload", "ref_offload", "kl", "onload", "offload", "image_embeds", "critic_model", "update_critic",
)  # fmt: skip
"""Every one has a `timing/<phase>`: 0.0 when it did not run, so that a column never comes and goes."""

SUMMED_PHASES = (
    "rollout", "old_log_p", "update", "reference_model", "resharding_to_train", "resharding_to_infer", "critic_model", "update_critic",
)  # fmt: skip
"""timing/all >= the sum of these + the largest timing/non_overlap_*."""

OVERLAPPING_PHASES = ("reference_model", "adv", "rule_reward", "reward_model")
"""Each has a `timing/non_overlap_<phase>`: the seconds that no phase of SUMMED_PHASES covers."""

_TIMING_ALIASES = {
    "timing/vit_image_emb": "timing/image_embeds",
    "timing/resharding_enter_infer": "timing/resharding_to_infer",
    "timing/resharding_exit_infer": "timing/resharding_to_train",
}


@dataclass(frozen=True)
class Metric:
    """Example: Metric(0.25, "mean", weight=12) is a mean of 0.25 over 12 tokens."""

    value: float
    reduction: Reduction = "mean"
    weight: float = 1.0
    """What a mean is weighted by; the other reductions ignore it."""


def reduce(records: Iterable[Mapping[str, Metric]]) -> dict[str, float]:
    """One value per name over ranks, micro-batches or mini-batches.

    Raises ValueError when two records name different reductions for one metric. A mean of total weight 0 is 0.0.
    """
    columns: dict[str, list[Metric]] = {}
    for record in records:
        for name, metric in record.items():
            columns.setdefault(name, []).append(metric)
    return {name: _reduce_column(name, column) for name, column in columns.items()}


def _reduce_column(name: str, column: Sequence[Metric]) -> float:
    reductions = {metric.reduction for metric in column}
    if len(reductions) > 1:
        raise ValueError(f"metric {name} is recorded with different reductions: {', '.join(sorted(reductions))}")
    values = [metric.value for metric in column]
    match column[0].reduction:
        case "sum":
            return float(sum(values))
        case "max":
            return float(max(values))
        case "min":
            return float(min(values))
    total = sum(metric.weight for metric in column)
    return sum(metric.value * metric.weight for metric in column) / total if total else 0.0


def distribution(name: str, values: Sequence[float]) -> dict[str, float]:
    """`name/mean`, `name/max`, `name/min`; zeros for no values. Example: distribution("response_length", [2, 4])."""
    if not values:
        return {f"{name}/{kind}": 0.0 for kind in ("mean", "max", "min")}
    return {f"{name}/mean": sum(values) / len(values), f"{name}/max": float(max(values)), f"{name}/min": float(min(values))}


@dataclass
class Stopwatch:
    """Intervals of an iteration's phases; a phase may run in several pieces, on several workers, and overlap others.

    Example:
        clock = Stopwatch()
        with clock.measure("all"), clock.measure("rollout"):
            ...
        clock.seconds("rollout")
    """

    intervals: dict[str, list[Interval]] = field(default_factory=dict)

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, start, time.perf_counter())

    def add(self, phase: str, start: float, end: float) -> None:
        """Records a piece measured elsewhere, in seconds of time.perf_counter of this machine."""
        self.intervals.setdefault(phase, []).append((start, end))

    def seconds(self, phase: str) -> float:
        """Length of the union of the phase's intervals: pieces that ran at the same time count once."""
        return _length(self.intervals.get(phase, []))

    def seconds_alone(self, phase: str, others: Sequence[str]) -> float:
        """Seconds of `phase` that no phase of `others` covers."""
        covered = [interval for other in others for interval in self.intervals.get(other, [])]
        return _length(self.intervals.get(phase, []) + covered) - _length(covered)


def _length(intervals: Sequence[Interval]) -> float:
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def timings(clock: Stopwatch) -> dict[str, float]:
    """Seconds under every timing name, the aliases included."""
    values = {f"timing/{phase}": clock.seconds(phase) for phase in PHASES}
    values |= {f"timing/{phase}": clock.seconds(phase) for phase in clock.intervals}
    values |= {f"timing/non_overlap_{phase}": clock.seconds_alone(phase, SUMMED_PHASES) for phase in OVERLAPPING_PHASES}
    return values | {alias: values[name] for alias, name in _TIMING_ALIASES.items()}


@dataclass(frozen=True)
class TokenCounts:
    """What the throughputs are computed from. Lengths are those of the samples that were trained on."""

    prompt_lengths: Sequence[int]
    response_lengths: Sequence[int]
    generated_samples: int
    """All samples of the iteration, dropped ones too: prompts drawn x samples per prompt."""
    trained_samples: int
    num_devices: int
    use_max_lengths: bool = False
    """rl_config.log_max_throughput: the longest instead of the mean lengths, an upper bound."""


def throughput(counts: TokenCounts, clock: Stopwatch) -> dict[str, float]:
    """Tokens per second and device: (mean prompt + mean response) x samples / devices / seconds.

    e2e_tps and vllm_tps count all generated samples over `all` and `rollout`; update_tps the trained ones over `update`.
    """
    if not counts.prompt_lengths or not counts.response_lengths:
        return {"e2e_tps": 0.0, "update_tps": 0.0, "vllm_tps": 0.0}
    kind = "max" if counts.use_max_lengths else "mean"
    length = distribution("l", counts.prompt_lengths)[f"l/{kind}"] + distribution("l", counts.response_lengths)[f"l/{kind}"]

    def tokens_per_second(samples: int, phase: str) -> float:
        seconds = clock.seconds(phase)
        return length * samples / counts.num_devices / seconds if seconds else 0.0

    return {
        "e2e_tps": tokens_per_second(counts.generated_samples, "all"),
        "update_tps": tokens_per_second(counts.trained_samples, "update"),
        "vllm_tps": tokens_per_second(counts.generated_samples, "rollout"),
    }


def aliases(algorithm: str, values: Mapping[str, float]) -> dict[str, float]:
    """Other names under which users look for the same value; only for values that are there."""
    names = {f"{algorithm}/rewards/{kind}": f"{algorithm}/score/{kind}" for kind in ("mean", "max", "min")}
    names |= {f"{algorithm}/lr": "actor/lr", "grad_norm": "actor/grad_norm"}
    return {alias: values[name] for alias, name in names.items() if name in values}


def iteration_record(algorithm: str, values: Mapping[str, float], clock: Stopwatch, counts: TokenCounts) -> dict[str, float]:
    """All that one line of metrics.jsonl holds: lengths, throughputs, timings, `values`, and their aliases."""
    record = distribution("prompt_length", counts.prompt_lengths) | distribution("response_length", counts.response_lengths)
    record |= throughput(counts, clock) | timings(clock) | dict(values)
    return record | aliases(algorithm, record)
