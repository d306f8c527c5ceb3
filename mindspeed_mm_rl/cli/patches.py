"""What `mm-rl patches` does: a table of the fixes to third-party versions, and what becomes of each on this machine."""

from __future__ import annotations

import json

from rich.table import Table
from rich.text import Text

from mindspeed_mm_rl.cli.environment import wide_console
from mindspeed_mm_rl.platforms import installation, patching

_COLOURS = {"applies": "green", "not needed": "dim", "unknown version": "red", "package missing": "yellow"}


def show_patches(as_json: bool) -> None:
    """Where, what and why of every file of patches/."""
    statuses = patching.statuses(installation.device())
    if as_json:
        print(json.dumps([_record(status) for status in statuses], indent=1))
        return
    wide_console().print(_table(statuses))


def _record(status: patching.Status) -> dict[str, object]:
    patch = status.patch
    return {
        "name": status.name,
        "package": patch.package,
        "versions": patch.versions,
        "process": patch.process,
        "devices": patch.devices,
        "state": status.state,
        "because": status.because,
        "reason": status.reason,
        "changes": patch.changes,
        "until": patch.until,
    }


def _table(statuses: list[patching.Status]) -> Table:
    table = Table(title="patches/", show_lines=True)
    for column, share in (("file, worker", 3), ("package", 2), ("here", 3), ("why, until when", 6)):
        table.add_column(column, overflow="fold", ratio=share)
    for status in statuses:
        patch = status.patch
        here = Text(status.state, style=_COLOURS[status.state])
        table.add_row(
            f"{status.name}.py\n{patch.process}",
            f"{patch.package}\n{patch.versions}",
            here + Text(f"\n{status.because}" if status.because else ""),
            f"{status.reason}\nUntil {patch.until}.",
        )
    return table
