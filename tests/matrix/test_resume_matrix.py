"""Four iterations straight equal two, a stop, and two more: both algorithms, one device and two."""

from pathlib import Path

import pytest

from tests.continuation import check_same, continuation_plan, dapo_with_refill, grpo_with_kl, picture_rows, stopped_and_resumed, straight


@pytest.mark.parametrize("num_devices", [1, 2], ids=["one_device", "two_devices"])
@pytest.mark.parametrize("algorithm", [grpo_with_kl, dapo_with_refill], ids=["grpo_with_kl", "dapo_with_refill"])
def test_a_stop_changes_nothing(tiny_vl: Path, tmp_path: Path, algorithm, num_devices: int) -> None:
    rows = picture_rows(tmp_path / "train.parquet")
    one = straight(algorithm(continuation_plan(tiny_vl, rows, tmp_path / "straight", num_devices)))
    other = stopped_and_resumed(algorithm(continuation_plan(tiny_vl, rows, tmp_path / "stopped", num_devices)))
    check_same(one, other)
    kinds = {
        grpo_with_kl: lambda: one.records[3]["actor/kl_loss"] > 0 and len({record["actor/kl_coef"] for record in one.records}) == 4,
        dapo_with_refill: lambda: any(
            record["train/num_gen_batches"] > 1 and record["train/filtered_groups"] > 0 for record in one.records
        ),
    }
    assert kinds[algorithm](), "the run was to use what its name says"
    assert len({record["actor/lr"] for record in one.records}) == 4
