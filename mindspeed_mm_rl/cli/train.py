"""Configuration, plan, preflight, training: what `mm-rl train` does, in this order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from rich.console import Console

from mindspeed_mm_rl.cli.environment import short_form
from mindspeed_mm_rl.cli.plan_view import render_plan
from mindspeed_mm_rl.config.check import check
from mindspeed_mm_rl.config.load import load_config


def train_from(config: Path, overrides: Sequence[str], dry_run: bool) -> None:
    """Raises ValueError with one sentence for everything that is wrong with the user's input, before any process is started."""
    checked = load_config(config, overrides)
    check(checked)
    console = Console()
    for line in short_form():
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    # Below this line torch is imported: seconds that a typo in the YAML shouldn't cost.
    from mindspeed_mm_rl.cli.memory_view import memory_view
    from mindspeed_mm_rl.cli.preflight import begin, preflight
    from mindspeed_mm_rl.config.derive import make_plan
    from mindspeed_mm_rl.platforms import memory

    plan = make_plan(checked)
    for line in (render_plan(plan), *memory_view(plan, memory.at_hand(plan.run.num_devices))):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    start = begin(plan, dry_run)
    if start.is_finished:
        console.print(start.finished_line, highlight=False, soft_wrap=True, markup=False)
        return
    for line in chain(start.notes, preflight(start)):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    if dry_run:
        console.print("dry run: everything checked, nothing trained")
        return
    from mindspeed_mm_rl.trainer.build import run

    run(plan)
