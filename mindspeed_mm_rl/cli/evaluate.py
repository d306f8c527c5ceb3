"""What `mm-rl evaluate` does: configuration, plan, checks, the weights of actor_config.load on eval.data_path, a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mindspeed_mm_rl.cli.plan_view import render_plan
from mindspeed_mm_rl.config.check import check
from mindspeed_mm_rl.config.load import load_config


def evaluate_from(config: Path, overrides: Sequence[str]) -> None:
    """Raises ValueError with one sentence for everything that is wrong with the user's input, before any process is started."""
    checked = load_config(config, overrides)
    if checked.eval is None:
        raise ValueError("section eval is missing, which says what to evaluate; add it to the YAML, or eval.data_path=FILE")
    check(checked)
    # Below this line torch is imported: seconds that a typo in the YAML shouldn't cost.
    from mindspeed_mm_rl.cli.preflight import begin, evaluation_preflight
    from mindspeed_mm_rl.config.derive import make_plan
    from mindspeed_mm_rl.models.weight_files import recognise
    from mindspeed_mm_rl.report import evaluation_table
    from mindspeed_mm_rl.trainer.evaluate import without_training

    console = Console()
    plan = without_training(make_plan(checked))
    console.print(render_plan(plan), highlight=False, soft_wrap=True, markup=False)
    for line in evaluation_preflight(begin(plan, dry_run=True)):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    from mindspeed_mm_rl.trainer.build import evaluate

    record = {"iteration": recognise(plan.train.load).iteration or 0} | evaluate(plan)
    console.print(evaluation_table([record], None))
    file = Path(plan.run.output) / "evaluation.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(f"values: {file}", highlight=False, soft_wrap=True, markup=False)
