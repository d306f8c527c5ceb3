"""The same updates under many layouts, each against one process; and the table of what differs."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from tests.layout_modes import MODELS, MODES, ONE_PROCESS, plan_for
from tests.layout_ranks import Seen, run
from tests.rank_pool import RankPool

_OF_LOSS = ("pg_loss", "kl_loss", "entropy", "vf_loss")
"""Those of a policy and that of a critic."""


@dataclass(frozen=True)
class Differences:
    """Largest ones from one process."""

    logprobs: float
    """Of a token, before the first and after the last update; a critic's values."""
    loss: float
    """Of an update, relative, of each of its terms."""
    grad_norm: float
    """Of an update, relative."""
    weights: float
    """Of a parameter, after the last update."""

    def check(self) -> None:
        """The bounds that the table promises."""
        assert self.logprobs <= 1e-4 and self.loss <= 1e-5 and self.grad_norm <= 1e-5, self
        # Three steps of 1e-3 each.
        assert self.weights <= 2e-5, self


class LayoutBench:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool = RankPool(seconds=120.0)
        self.found: dict[tuple[str, str], Differences | str] = {}
        """A word where the layout did not run."""
        self._single: dict[str, Seen] = {}

    def run(self, model: str, mode: str) -> Differences:
        """Raises RuntimeError with what the ranks said, and AssertionError where they don't agree with each other."""
        self.found[model, mode] = "FAILED"
        single, reference = self._reference(model), self.folder / f"{model}.pt"
        plan = plan_for(MODELS[model], MODES[mode], self.folder / model)
        seen = self.pool.run(MODES[mode].processes, run, plan, reference, MODELS[model].is_critic)
        differences = self.found[model, mode] = _differences(single, seen)
        return differences

    def _reference(self, model: str) -> Seen:
        if model not in self._single:
            folder = MODELS[model].make(self.folder / model)
            plan = plan_for(MODELS[model], ONE_PROCESS, folder)
            (self._single[model],) = self.pool.run(1, run, plan, self.folder / f"{model}.pt", MODELS[model].is_critic)
        return self._single[model]

    def table(self, megatron: str) -> str:
        """Everything that ran so far."""
        models = [model for model in MODELS if any(model == key[0] for key in self.found)]
        table = Table(
            title=f"Largest difference from one process: log-prob, loss (relative), gradient norm (relative); megatron-core {megatron}",
            box=box.SIMPLE_HEAD,
        )
        table.add_column("layout", no_wrap=True)
        for model in models:
            table.add_column(model, no_wrap=True)
        table.add_row("single", *["compared with"] * len(models))
        for mode in MODES:
            table.add_row(mode, *(_cell(self.found, model, mode) for model in models))
        console = Console(width=180, file=io.StringIO(), record=True)
        console.print(table)
        return console.export_text()

    def close(self) -> None:
        self.pool.close()


def _cell(found: Mapping[tuple[str, str], Differences | str], model: str, mode: str) -> str:
    seen = found.get((model, mode), "-")
    return seen if isinstance(seen, str) else " ".join(f"{number:.0e}".replace("e-0", "e-") for number in astuple(seen)[:3])


def _differences(single: Seen, ranks: list[Seen]) -> Differences:
    before, after = [seen.before for seen in ranks], [seen.after for seen in ranks]
    return Differences(
        logprobs=max(_largest(single.before, before), _largest(single.after, after)),
        loss=max(_relative(single, ranks, name) for name in _OF_LOSS if name in single.metrics[0]),
        grad_norm=_relative(single, ranks, "grad_norm"),
        weights=max(seen.weights for seen in ranks),
    )


def _largest(wanted: dict[int, list[float]], by_rank: list[dict[int, list[float]]]) -> float:
    answered = [sample_id for answer in by_rank for sample_id in answer]
    assert sorted(answered) == sorted(wanted), "every sample is answered for by one rank"
    given = {sample_id: values for answer in by_rank for sample_id, values in answer.items()}
    return max(abs(a - b) for key, values in wanted.items() for a, b in zip(values, given[key], strict=True))


def _relative(single: Seen, ranks: list[Seen], name: str) -> float:
    """Over the updates, and over the ranks that know the number."""
    largest = 0.0
    for step, wanted in enumerate(single.metrics):
        known = [seen.metrics[step][name] for seen in ranks if name in seen.metrics[step]]
        assert known, f"no rank knows {name}"
        largest = max([largest, *(abs(value / wanted[name] - 1.0) for value in known)])
    return largest
