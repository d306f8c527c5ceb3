"""The end of a run for people: a table and a picture of reward, accuracy, length, entropy and log-prob gap over the iterations."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_mm_rl.sinks import read_records

if TYPE_CHECKING:
    from rich.table import Table

_MAX_ROWS = 12
_EVALUATED = re.compile(r"(?P<place>eval(/.+)?)/(?P<metric>(mean|pass)@\d+|rewards/(accuracies|margins)|loss)")
_SHARE_OF_RIGHT = ("mean@", "rewards/accuracies")
_LENGTH = "response_length/mean"
_OF_PAIRS = {
    "loss": "loss",
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "logp chosen": "logps/chosen",
    "logp reject": "logps/rejected",
}


def report_columns(algorithm: str) -> dict[str, str]:
    """Title -> metric name."""
    if algorithm == "dpo":
        return _OF_PAIRS
    return {
        "reward": "rollout/reward/mean",
        "accuracy": f"{algorithm}/accuracy/mean",
        "length": "response_length/mean",
        "entropy": "actor/entropy",
        "log-prob gap": "rollout/logprob_gap/mean",
    }


def render_table(records: Sequence[dict[str, float]], columns: dict[str, str]) -> str:
    """First, last and evenly spaced iterations, at most 12 rows, plain text."""
    lines = ["iteration  " + "  ".join(f"{title:>12}" for title in columns)]
    for record in _evenly(records):
        cells = (record.get(name) for name in columns.values())
        lines.append(f"{record['iteration']:>9}  " + "  ".join(f"{_cell(cell):>12}" for cell in cells))
    return "\n".join(lines)


def evaluation_curves(records: Sequence[dict[str, float]]) -> dict[str, tuple[str, ...]]:
    """A panel with mean@n, or with the accuracy on pairs, of every data set; empty without evaluation."""
    found = dict.fromkeys(name for record in records for name in record if _EVALUATED.fullmatch(name))
    names = tuple(name for name in found if any(part in name for part in _SHARE_OF_RIGHT))
    return {"evaluation": names} if names else {}


def evaluation_table(records: Sequence[dict[str, float]], best: int | None) -> Table | None:
    """A row per evaluation and data set, those of the best save's iteration marked; None without evaluation."""
    from rich.table import Table

    evaluated = [(record, names) for record in records if (names := [m for key in record if (m := _EVALUATED.fullmatch(key))])]
    if not evaluated:
        return None
    metrics = list(dict.fromkeys(name["metric"] for _, names in evaluated for name in names))
    lengths = [_LENGTH] if any(name.endswith(_LENGTH) for record, _ in evaluated for name in record if name.startswith("eval/")) else []
    table = Table(title="evaluation", caption=None if best is None else f"* iteration {best} is the best save")
    for title in ("iteration", "data set", *metrics, *("length" for _ in lengths)):
        table.add_column(title, justify="left" if title == "data set" else "right")
    for record, names in _evenly(evaluated):
        iteration = f"{'* ' if record['iteration'] == best else ''}{record['iteration']}"
        for place in dict.fromkeys(name["place"] for name in names):
            cells = [_cell(record.get(f"{place}/{metric}")) for metric in (*metrics, *lengths)]
            table.add_row(iteration, place.removeprefix("eval").removeprefix("/") or "mean of all", *cells)
    return table


def _cell(value: float | None) -> str:
    return "-" if value is None else format(value, ".4g")


def _evenly(items: Sequence[Any]) -> list[Any]:
    """First, last and evenly spaced ones, at most 12."""
    picked = list(items[:: max(1, -(-(len(items) - 1) // (_MAX_ROWS - 1)))])
    return picked if not items or picked[-1] is items[-1] else [*picked, items[-1]]


def plot_curves(records: Sequence[dict[str, float]], columns: Mapping[str, str | Sequence[str]], path: Path) -> None:
    """A panel per title, with one curve or several. Writes the PNG by rename, so that a reader never sees half of it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(columns), 2.8), layout="constrained")
    for axis, (title, given) in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns.items(), strict=True):
        names = (given,) if isinstance(given, str) else given
        for name in names:
            points = [(record["iteration"], record[name]) for record in records if record.get(name) is not None]
            marker = "." if len(points) < 20 else None
            axis.plot([x for x, _ in points], [y for _, y in points], linewidth=1.4, marker=marker, label=name)
        if not isinstance(given, str):
            axis.legend(fontsize=6)
        axis.set_title(title)
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, path)


def write_report(output: Path, algorithm: str) -> str:
    """Reads `output`/metrics.jsonl, writes curves.png and table.txt beside it, returns the table."""
    records = read_records(output / "metrics.jsonl")
    columns = report_columns(algorithm)
    table = render_table([record for record in records if record["iteration"]], columns)
    (output / "table.txt").write_text(table + "\n")
    plot_curves(records, columns | evaluation_curves(records), output / "curves.png")
    return table


def report_evaluation(output: Path, best: int | None) -> Table | None:
    """evaluation_table of `output`/metrics.jsonl, also appended to table.txt."""
    from rich.console import Console

    table = evaluation_table(read_records(output / "metrics.jsonl"), best)
    if table is not None:
        with (output / "table.txt").open("a", encoding="utf-8") as file:
            # FORCE_COLOR is for terminals.
            Console(file=file, width=140, force_terminal=False).print(table)
    return table
