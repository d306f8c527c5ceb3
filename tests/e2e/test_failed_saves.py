"""A disk that is full when two trainer processes save: one sentence, and the save before is the one that a run goes on from."""

from dataclasses import replace
from pathlib import Path

import pytest

from mindspeed_mm_rl.trainer import build
from mindspeed_mm_rl.trainer.save_folder import TRACKER, check_whole
from mindspeed_mm_rl.trainer.state import save_bytes, size_text
from tests.continuation import continuation_plan, picture_rows
from tests.disks import small_disk


def test_a_full_disk_leaves_the_earlier_save(tiny_vl: Path, tmp_path: Path) -> None:
    plan = continuation_plan(tiny_vl, picture_rows(tmp_path / "train.parquet"), tmp_path, 2)
    with small_disk(tmp_path / "disk", save_bytes(plan) * 3 // 2) as disk:
        plan = replace(plan, run=replace(plan.run, save=str(disk / "save"), save_interval=1))
        with pytest.raises(RuntimeError) as error:
            build.run(plan)
        text = str(error.value)
        assert f"iteration 2 could not be saved: no space left in {disk / 'save'}, a save takes about {size_text(save_bytes(plan))}" in text
        assert "To go on after iteration 1" in text and "\n" not in text
        assert sorted(path.name for path in (disk / "save").iterdir()) == ["iter_0000001", TRACKER]
        assert check_whole(disk / "save" / "iter_0000001")["iteration"] == 1
