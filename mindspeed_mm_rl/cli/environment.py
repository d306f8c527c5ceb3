"""What `mm-rl env` shows: versions and devices, the combinations that are supported, what is wrong here and the command that mends it.

Imports nothing but rich and the standard library, so that it speaks where everything else is broken.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mindspeed_mm_rl.platforms import diagnosis, installation, patching
from mindspeed_mm_rl.platforms.compat import COMBINATIONS, Combination
from mindspeed_mm_rl.platforms.diagnosis import Finding
from mindspeed_mm_rl.platforms.installation import Installation, Probe

_SHORT = ("python", "torch", "torch_npu", "megatron-core", "mindspeed", "vllm", "transformers", "ray")
_PIPE_WIDTH = 140


def show_environment(as_json: bool) -> bool:
    """Whether all is well."""
    found = installation.read()
    asked = installation.probe(found.device)
    told = diagnosis.findings(found, asked)
    if as_json:
        print(json.dumps(_record(found, asked, told), indent=1))
    else:
        _print(found, asked, told)
    return not _wrong(told)


def short_form() -> list[str]:
    """One line, and one more for each thing that is wrong; torch is not imported."""
    found = installation.read()
    row, exact = diagnosis.nearest(found)
    shown = ", ".join(f"{name} {found.packages[name]}" for name in _SHORT if name in found.packages)
    known = f"combination {row.name} ({row.tested})" if exact else "no combination that is supported"
    lines = [f"{found.device}: {shown}; {known}; {_patches(found)}"]
    return lines + [f"wrong: {finding.what}; mend it by: {finding.mend}" for finding in _wrong(diagnosis.findings(found))]


def _patches(found: Installation) -> str:
    """Raises ValueError where there are none."""
    states = Counter(status.state for status in patching.statuses(found.device))
    unknown = f", {states['unknown version']} of unknown versions" if states["unknown version"] else ""
    return f"{states['applies']} patches apply{unknown}"


def wide_console() -> Console:
    """Into a file or a pipe, tables are as wide as they need to be to be read."""
    console = Console()
    return console if console.is_terminal else Console(width=_PIPE_WIDTH)


def _wrong(told: list[Finding]) -> list[Finding]:
    return [finding for finding in told if finding.level == "wrong"]


def _record(found: Installation, asked: Probe, told: list[Finding]) -> dict[str, object]:
    row, exact = diagnosis.nearest(found)
    return {
        "ok": not _wrong(told),
        "installation": asdict(found),
        "devices": asked.devices,
        "combination": row.name if exact else None,
        "nearest": row.name,
        "findings": [asdict(finding) for finding in told],
        "patches": {status.name: status.state for status in patching.statuses(found.device)},
        "combinations": [asdict(combination) for combination in COMBINATIONS],
    }


def _print(found: Installation, asked: Probe, told: list[Finding]) -> None:
    console = wide_console()
    row, exact = diagnosis.nearest(found)
    console.print(_packages(found, row))
    console.print(_combinations(row, exact=exact))
    for line in (f"device: {_devices(found, asked)}", *([f"limits of {row.name}: {row.limits}"] if row.limits else [])):
        console.print(line, markup=False, highlight=False)
    for finding in told:
        console.print(Text(f"{finding.level}: {finding.what}", style="red" if finding.level == "wrong" else "yellow"), soft_wrap=True)
        console.print(f"  {finding.mend}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{_patches(found)}; mm-rl patches lists all", highlight=False)
    if not _wrong(told):
        console.print("nothing is wrong", style="green")


def _devices(found: Installation, asked: Probe) -> str:
    if found.device == "cpu":
        return f"cpu ({found.architecture})"
    kinds = Counter(f"{name} ({memory / 1e9:.0f} GB)" for name, memory in asked.devices)
    return f"{found.device}: " + (", ".join(f"{count} x {name}" for name, count in kinds.items()) or "none that torch sees")


def _packages(found: Installation, row: Combination) -> Table:
    table = Table(title="installed")
    for column in ("package", "here", f"combination {row.name}"):
        table.add_column(column)
    for name in dict.fromkeys((*row.packages, *installation.PACKAGES)):
        want, version = row.packages.get(name), found.packages.get(name)
        if want is None and version is None:
            continue
        fits = want is None or (version is not None and diagnosis.fits(found, name, want))
        place = f" ({found.elsewhere[name]})" if name in found.elsewhere else ""
        table.add_row(name, Text(f"{version or 'missing'}{place}", style="" if fits else "red"), want.allowed if want else "")
    return table


def _combinations(nearest: Combination, exact: bool) -> Table:
    table = Table(title="combinations")
    for column in ("", "name", "versions", "tested"):
        table.add_column(column, overflow="fold")
    for row in COMBINATIONS:
        mark = ("here" if exact else "nearest") if row is nearest else ""
        wants = ", ".join(f"{name} {want.allowed}" for name, want in row.packages.items())
        table.add_row(mark, row.name, wants, row.tested + (f"; {row.limits}" if row.limits else ""))
    return table
