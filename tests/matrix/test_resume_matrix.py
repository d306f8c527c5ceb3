"""Four iterations straight equal two, a stop, and two more: three algorithms, one device and two."""

from dataclasses import replace
from pathlib import Path

import pytest

from mindspeed_mm_rl.sinks import read_records
from mindspeed_mm_rl.trainer import build
from tests.continuation import (
    check_same,
    continuation_plan,
    dapo_with_refill,
    grpo_with_kl,
    picture_rows,
    ppo_with_kl,
    saved_tensors,
    stopped_and_resumed,
    straight,
)

# Three runs each, with Ray, the trainer and the rollout engine started anew.
pytestmark = pytest.mark.timeout(1200)


@pytest.mark.parametrize("num_devices", [1, 2], ids=["one_device", "two_devices"])
@pytest.mark.parametrize(
    "algorithm", [grpo_with_kl, dapo_with_refill, ppo_with_kl], ids=["grpo_with_kl", "dapo_with_refill", "ppo_with_kl"]
)
def test_a_stop_changes_nothing(tiny_vl: Path, tmp_path: Path, algorithm, num_devices: int) -> None:
    rows = picture_rows(tmp_path / "train.parquet")
    one = straight(algorithm(continuation_plan(tiny_vl, rows, tmp_path / "straight", num_devices)))
    other = stopped_and_resumed(algorithm(continuation_plan(tiny_vl, rows, tmp_path / "stopped", num_devices)))
    check_same(one, other)
    kinds = {
        ppo_with_kl: lambda: (
            len({record["actor/kl_coef"] for record in one.records}) == 4
            and any(key.startswith("critic/optimizer.") for key in one.tensors)
        ),
        grpo_with_kl: lambda: one.records[3]["actor/kl_loss"] > 0 and len({record["actor/kl_coef"] for record in one.records}) == 4,
        dapo_with_refill: lambda: any(
            record["train/num_gen_batches"] > 1 and record["train/filtered_groups"] > 0 for record in one.records
        ),
    }
    assert kinds[algorithm](), "the run was to use what its name says"
    assert len({record["actor/lr"] for record in one.records}) == 4


def test_a_run_goes_on_with_another_number_of_devices(tiny_vl: Path, tmp_path: Path) -> None:
    """One device, then two: the same prompts as on one device all along, and the same weights but for the order of sums."""
    rows = picture_rows(tmp_path / "train.parquet")
    one = dapo_with_refill(continuation_plan(tiny_vl, rows, tmp_path / "one", 1))
    other = dapo_with_refill(continuation_plan(tiny_vl, rows, tmp_path / "other", 1))
    one, other = (replace(plan, run=replace(plan.run, train_iters=2, save_interval=1)) for plan in (one, other))
    build.run(one)
    build.run(replace(other, run=replace(other.run, train_iters=1)))
    build.run(replace(other, run=replace(other.run, num_devices=2)))
    left, right = (saved_tensors(Path(plan.run.save) / "iter_0000002" / "actor") for plan in (one, other))
    for name, tensor in left.items():
        if name.startswith("model."):
            # Adam's step is lr * sign(gradient) at first: where a gradient is about 0, the sign is noise.
            assert ((right[name] - tensor).abs() <= 2e-5).float().mean() > 0.99, name
    records = [read_records(Path(plan.run.output) / "metrics.jsonl") for plan in (one, other)]
    assert records[0][1]["train/num_gen_batches"] == records[1][1]["train/num_gen_batches"]
