"""The save that was the best in evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mindspeed_mm_rl.config.plan import EvalPlan


@dataclass(frozen=True)
class Best:
    """Example: Best(40, "eval/geometry3k/mean@4", 0.53)."""

    iteration: int
    metric: str
    value: float

    def or_better(self, other: Best) -> Best:
        """Of equal ones the earlier."""
        return other if other.metric != self.metric or other.value > self.value else self


def remembered_best(contents: Mapping[str, Any], now: EvalPlan | None) -> Best | None:
    """That of a save's state.json; None where it was measured in another way than now, so that the values can't be compared."""
    if not contents.get("best"):
        return None
    measured = contents["plan"].get("eval")
    if now is not None and (measured is None or _measure(measured) != _measure(asdict(now))):
        return None
    return Best(**contents["best"])


def _measure(plan: Mapping[str, Any]) -> list[Any]:
    """What decides the values; tuples are lists in JSON."""
    return [
        list(plan["data"]),
        plan["samples_per_prompt"],
        plan["temperature"],
        plan["max_rows"],
        list(plan["reward"]["verifiers"]),
        plan.get("held_out_rows", 0),
    ]
