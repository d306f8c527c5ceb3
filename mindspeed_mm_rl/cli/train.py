"""Configuration, plan, preflight, training: what `mm-rl train` does, in this order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mindspeed_mm_rl.cli.plan_view import render_plan
from mindspeed_mm_rl.config.check import check
from mindspeed_mm_rl.config.load import load_config


def train_from(config: Path, overrides: Sequence[str], dry_run: bool) -> None:
    """Raises ValueError with one sentence for everything that is wrong with the user's input, before any process is started."""
    checked = load_config(config, overrides)
    check(checked)
    # Below this line torch is imported: seconds that a typo in the YAML shouldn't cost.
    from mindspeed_mm_rl.cli.preflight import begin, preflight
    from mindspeed_mm_rl.config.derive import make_plan

    console = Console()
    plan = make_plan(checked)
    console.print(render_plan(plan), highlight=False, soft_wrap=True, markup=False)
    start = begin(plan, dry_run)
    if start.is_finished:
        console.print(start.finished_line, highlight=False, soft_wrap=True, markup=False)
        return
    for line in (*start.notes, *preflight(start)):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    if dry_run:
        console.print("dry run: everything checked, nothing trained")
        return
    from mindspeed_mm_rl.trainer.build import run

    run(plan)
