"""State that leaves the device between phases comes back as it was: training is the same to the last bit, under any layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import footprint_ranks
from tests.layout_modes import Model
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
OVERLAP = {**DISTRIBUTED, "overlap_grad_reduce": True, "overlap_param_gather": True}
SEVERAL = {
    "TP2+SP": ("qwen2", "actor", {"tensor_parallel_size": 2, "sequence_parallel": True}, {}),
    "PP2+VPP2": ("qwen2", "actor", {"pipeline_parallel_size": 2, "pipeline_layers": ((1, 1), (1, 1))}, {}),
    "DP2, distributed optimizer, overlap": ("qwen2", "actor", {"dtype": "bfloat16"}, OVERLAP),
    "EP2, distributed optimizer": ("qwen3_moe", "actor", {"expert_parallel_size": 2}, DISTRIBUTED),
    "vision workers, TP2": ("qwen2_5_vl", "vision", {"tensor_parallel_size": 2, **TRAINED_VISION}, {}),
}


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
    for stays, leaves in zip(*seen, strict=True):
        assert len(stays) >= 8
        assert [name for name in stays if leaves[name] != stays[name]] == []


@pytest.mark.parametrize("name", ONE_PROCESS)
def test_one_process(pool: RankPool, request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    model, role, fields, optimizer = ONE_PROCESS[name]
    check(pool, 1, train_plan(request.getfixturevalue(model), optimizer=optimizer_plan(**optimizer), **fields), role, tmp_path)


@pytest.mark.parametrize("name", SEVERAL)
def test_two_processes(pool: RankPool, tmp_path: Path, name: str) -> None:
    family, role, fields, optimizer = SEVERAL[name]
    model = Model(family).make(tmp_path / "model")
    check(pool, 2, train_plan(model, max_samples_per_micro_batch=2, optimizer=optimizer_plan(**optimizer), **fields), role, tmp_path)


ESTIMATED = {
    "one process, pictures, frozen encoder": (1, "qwen2_5_vl", {}, {}),
    "one process, pictures, encoder trained, bfloat16": (1, "qwen2_5_vl", {**TRAINED_VISION, "dtype": "bfloat16"}, {}),
    "TP2+SP, bfloat16": (2, "qwen2", {"tensor_parallel_size": 2, "sequence_parallel": True, "dtype": "bfloat16"}, {}),
    "PP2+VPP2": (2, "qwen2", {"pipeline_parallel_size": 2, "pipeline_layers": ((1, 1), (1, 1))}, {}),
    "DP2, bfloat16, distributed optimizer": (2, "qwen2", {"dtype": "bfloat16"}, DISTRIBUTED),
    "EP2, bfloat16, distributed optimizer": (2, "qwen3_moe", {"expert_parallel_size": 2, "dtype": "bfloat16"}, DISTRIBUTED),
}


@pytest.mark.parametrize("name", ESTIMATED)
def test_the_estimated_state_is_what_the_tensors_take(pool: RankPool, tmp_path: Path, name: str) -> None:
    """But for padding of buffers, which is nothing in a real model."""
    world, family, fields, optimizer = ESTIMATED[name]
    model = Model(family).make(tmp_path / "model")
    plan = train_plan(model, max_samples_per_micro_batch=2, optimizer=optimizer_plan(**optimizer), **fields)
    for taken, estimated in pool.run(world, footprint_ranks.run, plan):
        assert taken == pytest.approx(estimated, rel=0.01)
