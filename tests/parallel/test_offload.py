"""State that leaves the device between phases comes back as it was: training is the same to the last bit, under any layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.layout_modes import MODES, plan_for
from tests.offload_phases import EVERYTHING, run
from tests.plans import optimizer_plan, train_plan
from tests.rank_pool import RankPool

DISTRIBUTED = {"use_distributed_optimizer": True}
TRAINED_VISION = {"freeze_vision": False, "freeze_projector": False}
ONE_PROCESS = {
    "text, tied": ("tiny_text", "actor", {}, {}),
    "text, tied, bfloat16": ("tiny_text", "actor", {"dtype": "bfloat16"}, {}),
    "text, distributed optimizer": ("tiny_text", "actor", {}, DISTRIBUTED),
    "text, bfloat16, distributed optimizer": ("tiny_text", "actor", {"dtype": "bfloat16"}, DISTRIBUTED),
    "pictures, frozen encoder": ("tiny_vl", "actor", {}, {}),
    "pictures, encoder trained, bfloat16": ("tiny_vl", "actor", {**TRAINED_VISION, "dtype": "bfloat16"}, DISTRIBUTED),
    "critic": ("tiny_text", "critic", {}, {}),
    "critic, bfloat16, distributed optimizer": ("tiny_text", "critic", {"dtype": "bfloat16"}, DISTRIBUTED),
}
SEVERAL = ("TP2+SP", "PP2+VPP2", "DP2+dist.opt., overlap", "EP2+dist.opt., overlap")


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(seconds=120.0) as pool:
        yield pool


def check(pool: RankPool, world: int, plan: Any, role: str, folder: Path) -> None:
    seen = []
    for offload in ((), EVERYTHING):
        where = folder / str(len(seen))
        (where / "last").mkdir(parents=True)
        (where / "first").mkdir()
        seen.append(pool.run(world, run, replace(plan, offload=offload), role, where))
    assert len(seen[0][0]) >= 10
    assert seen[1] == seen[0]


@pytest.mark.parametrize("name", ONE_PROCESS)
def test_one_process(pool: RankPool, request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    model, role, fields, optimizer = ONE_PROCESS[name]
    check(pool, 1, train_plan(request.getfixturevalue(model), optimizer=optimizer_plan(**optimizer), **fields), role, tmp_path)


@pytest.mark.parametrize("mode", SEVERAL)
def test_several_processes(pool: RankPool, tmp_path: Path, mode: str) -> None:
    from tests.layout_modes import MODELS

    model = "Qwen3-MoE" if MODES[mode].needs_experts else "Qwen2.5"
    folder = MODELS[model].make(tmp_path / "model")
    check(pool, MODES[mode].processes, plan_for(model, folder, mode), "actor", tmp_path)
