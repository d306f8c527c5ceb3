"""`python -m tests.chaos --kills 40 --seed 0`: kills runs at random moments and prints what came of each; exit code 1 if one went wrong."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from tests.chaos.moments import Kill, plan_kills
from tests.chaos.scene import SETTINGS, make_scene
from tests.chaos.verdict import Reference, Verdict, judge, make_reference

HEADER = ("kill", "setting", "victim", "phase", "iteration", "exit", "message after", "clean after", "save", "resumed equal", "faults")
_TRIES = 3
"""Of a moment that a run did not offer."""


def row(number: int, verdict: Verdict) -> tuple[str, ...]:
    kill, hit = verdict.kill, verdict.hit

    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f} s"

    return (
        str(number), kill.setting, kill.victim, kill.phase.name, str(hit.iteration if hit else "-"), str(verdict.exit_code),
        seconds(verdict.message_seconds), seconds(verdict.clean_seconds), str(verdict.save), "yes" if verdict.equal else "NO",
        "; ".join(verdict.faults) or "none",
    )  # fmt: skip


def table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[column]) for line in (HEADER, *rows)) for column in range(len(HEADER) - 1)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, (*widths, 0), strict=True)) for line in (HEADER, *rows))


def run_kill(scene: Path, reference: Reference, kill: Kill, folder: Path, seed: int) -> Verdict:
    for attempt in range(_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        # Sooner and earlier every time, so that more occasions are left.
        easier = replace(kill, iteration=max(1, kill.iteration - attempt))
        verdict = judge(scene, reference, easier, folder, 4.0**attempt, seed)
        if verdict.hit is not None:
            break
    return verdict


def chaos(folder: Path, kills: list[tuple[int, Kill]], seed: int, report: Path) -> bool:
    """True when every kill went as it must. The folders of those that did not are kept."""
    scene = make_scene(folder / "scene")
    references = {name: make_reference(scene, name, folder / name) for name in sorted({kill.setting for _, kill in kills})}
    rows, verdicts = [], []
    for number, kill in kills:
        place = folder / f"kill_{number:02d}"
        verdict = run_kill(scene, references[kill.setting], kill, place, seed + number)
        rows.append(row(number, verdict))
        verdicts.append(verdict)
        print(table(rows[-1:]).splitlines()[1], flush=True)
        if verdict.message:
            print(f"      {verdict.message}", flush=True)
        if not verdict.faults:
            shutil.rmtree(place)
        report.parent.mkdir(parents=True, exist_ok=True)
        messages = sorted({verdict.message for verdict in verdicts if verdict.message})
        report.write_text("\n".join([table(rows), "", "messages:", *messages, ""]))
    return not any(verdict.faults for verdict in verdicts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=4 * 10, help="how many; all pairs of victim and phase are 40")
    parser.add_argument("--seed", type=int, default=0, help="draws order, iteration, moment within the phase, and rank")
    parser.add_argument("--first", type=int, default=1, help="number of the first one that is done, to go on where an earlier call ended")
    parser.add_argument("--setting", choices=sorted(SETTINGS), action="append", help="only these (both)")
    parser.add_argument("--report", type=Path, default=Path("logs/chaos.txt"), help="file of the table")
    arguments = parser.parse_args()
    # What is under way is to be taken down then, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    numbered = list(enumerate(plan_kills(arguments.kills, arguments.seed, tuple(arguments.setting or sorted(SETTINGS))), start=1))
    kills = numbered[arguments.first - 1 :]
    folder, began = Path(tempfile.mkdtemp(prefix="chaos_")), time.monotonic()
    good = chaos(folder, kills, arguments.seed, arguments.report)
    print(f"{len(kills)} kills in {time.monotonic() - began:.0f} s: {'all as they must be' if good else 'NOT as they must be'}")
    print(f"table: {arguments.report}")
    if good:
        shutil.rmtree(folder)
    else:
        print(f"runs that went wrong: {folder}")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
