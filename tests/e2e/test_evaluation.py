"""Evaluation beside training, rows with pictures and without: what is logged, what a resumed run does with it, and that training does
not notice."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mindspeed_mm_rl.config.plan import EvalPlan, Plan
from mindspeed_mm_rl.sinks import read_records
from mindspeed_mm_rl.trainer import build
from tests.continuation import compared, continuation_plan, picture_rows
from tests.data_files import row, write_rows


def plan_of(model: Path, rows: Path, output: Path) -> Plan:
    plan = continuation_plan(model, rows, output, num_devices=1)
    return replace(plan, run=replace(plan.run, train_iters=2, save_interval=1, keep_last=1, use_tensorboard=False))


def evaluated(plan: Plan, files: list[Path]) -> Plan:
    reward = replace(plan.reward, overlong_buffer=0)
    return replace(plan, eval=EvalPlan(tuple(map(str, files)), 1, True, samples_per_prompt=3, temperature=1.0, max_rows=5, reward=reward))


def test_training_is_the_same_with_evaluation_and_a_stop(tiny_vl: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = picture_rows(tmp_path / "train.parquet")
    plain = plan_of(tiny_vl, rows, tmp_path / "plain")
    build.run(plain)
    text = [row(f"Add {number} and 1.", [], answer=str(number + 1), data_source="sums") for number in range(3)]
    files = [picture_rows(tmp_path / "test.parquet"), write_rows(tmp_path / "sums.parquet", text)]
    plan = evaluated(plan_of(tiny_vl, rows, tmp_path / "evaluated"), files)
    build.run(replace(plan, run=replace(plan.run, train_iters=1)))
    build.run(plan)

    records = read_records(Path(plan.run.output) / "metrics.jsonl")
    assert [record["iteration"] for record in records] == [0, 1, 2]
    sets = ("hiyouga/geometry3k", "sums")
    names = {f"eval/{place}{metric}" for place in (*(f"{s}/" for s in sets), "") for metric in ("mean@3", "pass@1", "pass@2", "pass@3")}
    names |= {f"eval/{data_set}/{name}" for data_set in sets for name in ("reward/mean", "response_length/mean", "num_prompts")}
    names |= {"eval/timeouts", "eval/crashes", "timing/eval"}
    for record in records:
        assert {name for name in record if name.startswith("eval/")} | {"timing/eval"} == names
        assert [record[f"eval/{data_set}/num_prompts"] for data_set in sets] == [5, 3]
    assert records[0].keys() == names | {"iteration"}

    straight = read_records(Path(plain.run.output) / "metrics.jsonl")
    for left, right in zip(straight, records[1:], strict=True):
        assert compared(left) == {name: value for name, value in compared(right).items() if name not in names}

    # A random model is never right: the first of equal saves stays the best, and stays.
    saves = Path(plan.run.save)
    assert sorted(path.name for path in saves.glob("iter_*")) == ["iter_0000001", "iter_0000002"]
    assert (saves / "best_checkpointed_iteration.txt").read_text() == "1\n"
    best = json.loads((saves / "iter_0000002" / "state.json").read_text())["best"]
    assert best == {"iteration": 1, "metric": "eval/mean@3", "value": 0.0}
    assert re.search(r"\* 1 │ sums +│ +0 │", capfd.readouterr().err)
