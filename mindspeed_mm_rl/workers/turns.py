"""Groups of processes that share devices: one works, the others have given back what memory they may.

    actor.update --take("update", actor)--> rollout sleeps; actor brings back what an update needs
    rollout.generate --take("rollout", rollout)--> actor's state leaves; rollout wakes

Whoever works brings back by himself what he needs; a turn only sends off those who had the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from mindspeed_mm_rl.types import PhaseReport

_GIB = 1 << 30


class Sharer(Protocol):
    def rest(self) -> None:
        """Gives device memory back until it is needed again."""

    def phase_reports(self) -> Sequence[PhaseReport]:
        """Of its processes, since they were last asked."""


class Turns:
    """Who works on the devices, and at what."""

    def __init__(self, start_together: bool = True) -> None:
        """start_together: whether there is memory for the state of all groups at once, as on CPU."""
        self.start_together = start_together
        self._started: list[Any] = []
        self._phase, self._groups = "", ()
        self._metrics: dict[str, float] = {}

    def earlier(self) -> list[Any]:
        """Object refs that whoever starts now waits for: of those who started before and then gave the device back."""
        return [] if self.start_together else list(self._started)

    def starting(self, refs: Sequence[Any]) -> None:
        self._started += refs

    def take(self, phase: str, *groups: Sharer) -> None:
        """Call it before any work of `groups`, which hold the devices together. phase: name for metrics; empty = none."""
        if (phase, groups) == (self._phase, self._groups):
            return
        for group in self._groups:
            if group not in groups:
                group.rest()
        self._collect()
        self._phase, self._groups = phase, groups

    def take_metrics(self) -> dict[str, float]:
        """Of the phases since this was last asked: the most memory of one process, and seconds for coming and leaving of state.

        It ends the phase; whoever worked keeps his place.
        """
        self._collect()
        self._phase = ""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def _collect(self) -> None:
        reports = [report for group in self._groups for report in group.phase_reports()]
        if reports and self._phase:
            name = f"memory/{self._phase}/peak_gb"
            self._metrics[name] = max(self._metrics.get(name, 0.0), *(report.peak_bytes / _GIB for report in reports))
        for phase in {phase for report in reports for phase in report.seconds}:
            # The slowest process: the others wait for it.
            slowest = max(report.seconds.get(phase, 0.0) for report in reports)
            self._metrics[f"timing/{phase}"] = self._metrics.get(f"timing/{phase}", 0.0) + slowest
