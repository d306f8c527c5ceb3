"""The end of a run for people: a table and a picture of reward, accuracy, length, entropy and log-prob gap over the iterations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mindspeed_mm_rl.sinks import read_records

_MAX_ROWS = 12


def report_columns(algorithm: str) -> dict[str, str]:
    """Title -> metric name."""
    return {
        "reward": "rollout/reward/mean",
        "accuracy": f"{algorithm}/accuracy/mean",
        "length": "response_length/mean",
        "entropy": "actor/entropy",
        "log-prob gap": "rollout/logprob_gap/mean",
    }


def render_table(records: Sequence[dict[str, float]], columns: dict[str, str]) -> str:
    """First, last and evenly spaced iterations, at most 12 rows, plain text."""
    step = max(1, -(-(len(records) - 1) // (_MAX_ROWS - 1)))
    picked = list(records[::step])
    if records and picked[-1] is not records[-1]:
        picked.append(records[-1])
    lines = ["iteration  " + "  ".join(f"{title:>12}" for title in columns)]
    for record in picked:
        cells = (record.get(name) for name in columns.values())
        lines.append(f"{record['iteration']:>9}  " + "  ".join(f"{'-' if cell is None else format(cell, '.4g'):>12}" for cell in cells))
    return "\n".join(lines)


def plot_curves(records: Sequence[dict[str, float]], columns: dict[str, str], path: Path) -> None:
    """Writes the PNG by rename, so that a reader never sees half of it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(columns), 2.8), layout="constrained")
    for axis, (title, name) in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns.items(), strict=True):
        points = [(record["iteration"], record[name]) for record in records if record.get(name) is not None]
        axis.plot([x for x, _ in points], [y for _, y in points], linewidth=1.4, marker="." if len(points) < 20 else None)
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
    table = render_table(records, columns)
    (output / "table.txt").write_text(table + "\n")
    plot_curves(records, columns, output / "curves.png")
    return table
