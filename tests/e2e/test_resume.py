"""A run that was stopped ends like one that was not: two of the four cases of tests/matrix, and a batch size changed on the way."""

from dataclasses import replace
from pathlib import Path

import pytest

from mindspeed_mm_rl.sinks import read_records
from mindspeed_mm_rl.trainer import build
from mindspeed_mm_rl.trainer.save_folder import SaveFolder, check_whole
from tests.continuation import (
    check_same,
    continuation_plan,
    dapo_with_refill,
    grpo_with_kl,
    picture_rows,
    stopped_and_resumed,
    straight,
    watching,
)

# Three runs each, with Ray, the trainer and the rollout engine started anew.


@pytest.mark.parametrize(("algorithm", "num_devices"), [(grpo_with_kl, 1), (dapo_with_refill, 2)], ids=["grpo_with_kl", "dapo_two_devices"])
def test_a_stop_changes_nothing(tiny_vl: Path, tmp_path: Path, algorithm, num_devices: int) -> None:
    rows = picture_rows(tmp_path / "train.parquet")
    one = straight(algorithm(continuation_plan(tiny_vl, rows, tmp_path / "straight", num_devices)))
    other = stopped_and_resumed(algorithm(continuation_plan(tiny_vl, rows, tmp_path / "stopped", num_devices)))
    check_same(one, other)


def test_another_batch_size_loses_and_repeats_no_prompt_and_a_finished_run_stays_so(
    tiny_vl: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """4 prompts in the first iteration, 6 in each of the next two: prompts 0 to 15 of the stream, in order."""
    plan = continuation_plan(tiny_vl, picture_rows(tmp_path / "train.parquet"), tmp_path, 1)
    first = replace(plan, run=replace(plan.run, train_iters=1))
    second = replace(plan, run=replace(plan.run, train_iters=3, prompts_per_generation=6), recipe=replace(plan.recipe, train_prompts=6))
    with watching() as batches:
        build.run(first)
        build.run(second)
    n = plan.run.samples_per_prompt
    drawn = [sample_id // n for batch in batches for sample_id in batch.sample_ids[::n]]
    assert drawn == list(range(4 + 6 + 6))
    assert check_whole(SaveFolder(Path(plan.run.save)).path_of(3))["data"]["prompts"] == 16
    capfd.readouterr()
    build.run(second)
    assert "nothing left to train" in " ".join(capfd.readouterr().err.split())
    assert len(read_records(Path(plan.run.output) / "metrics.jsonl")) == 3
