"""Prints what evaluate.py measured and says whether the model learned; exit status 1 when it did not.

python examples/rl/quickstart/verdict.py quickstart/evaluation.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

NEEDED_GAIN = 0.30
BLANKED_TOLERANCE = 0.05
KINDS = {"sampled": "mean@{samples} at temperature 1", "greedy": "greedy"}


def table(result: dict) -> Table:
    shown = Table(title=f"accuracy on {result['pictures']} held-out pictures (chance: {result['chance']:.3f})")
    for title in ("", "before", "after", "gain", "after, pictures blanked"):
        shown.add_column(title, justify="right")
    before, after = result["models"]["before"], result["models"]["after"]
    for kind, title in KINDS.items():
        numbers = before[kind], after[kind], after[kind] - before[kind], after[f"blanked_{kind}"]
        shown.add_row(title.format(**result), *(f"{number:.3f}" for number in numbers))
    return shown


def complaints(result: dict) -> list[str]:
    """One sentence per thing that a run that learned to read pictures does not show."""
    before, after = result["models"]["before"], result["models"]["after"]
    found = []
    for kind in KINDS:
        if (gain := after[kind] - before[kind]) < NEEDED_GAIN:
            found.append(f"{kind} accuracy rose by {100 * gain:.0f} points, {100 * NEEDED_GAIN:.0f} were expected")
        if (blanked := after[f"blanked_{kind}"]) > result["chance"] + BLANKED_TOLERANCE:
            found.append(
                f"{kind} accuracy without pictures is {blanked:.3f}, chance is {result['chance']:.3f}: the answer leaks into the text"
            )
    return found


def main() -> None:
    result = json.loads(Path(sys.argv[1]).read_text())
    Console().print(table(result))
    if problems := complaints(result):
        raise SystemExit("the model did not learn as it should: " + "; ".join(problems))
    print("The model learned to read the pictures.")


if __name__ == "__main__":
    main()
