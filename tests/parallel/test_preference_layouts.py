"""Pairs under each kind of parallelism: reference, losses, metrics and what comes out of two updates are those of one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mindspeed_mm_rl.config.plan import TrainPlan
from tests.layout_modes import MODELS, MODES, ONE_PROCESS, Mode, plan_for
from tests.preference_ranks import Seen, run
from tests.rank_pool import RankPool

CASES = {
    "DP2": ("Qwen2.5-VL", "sigmoid"),
    "TP2+SP": ("Qwen2.5-VL", "sigmoid"),
    "PP2+VPP2": ("Qwen2.5", "orpo"),
    "PP2": ("Qwen2.5", "sigmoid"),
    "CP2 all_gather": ("Qwen2.5", "ipo"),
    "EP2": ("Qwen3-MoE", "sigmoid"),
}
"""Layout -> model and loss."""


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(seconds=120.0) as pool:
        yield pool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pairs")


def plan_of(model: str, mode: Mode, folder: Path) -> TrainPlan:
    if not (folder / model).exists():
        MODELS[model].make(folder / model)
    return replace(plan_for(MODELS[model], mode, folder / model), rows_together=2, temperature=1.0, bans_markers=False)


@pytest.mark.parametrize("mode", CASES)
def test_a_layout_changes_nothing(pool: RankPool, folder: Path, mode: str) -> None:
    model, loss_type = CASES[mode]
    (one,) = pool.run(1, run, plan_of(model, ONE_PROCESS, folder), loss_type)
    ranks = pool.run(MODES[mode].processes, run, plan_of(model, MODES[mode], folder), loss_type)
    for column in ("references", "later_logprobs"):
        check_same(getattr(one, column), [getattr(seen, column) for seen in ranks])
    check_metrics(one, ranks)


def check_same(wanted: dict[int, list[float]], by_rank: list[dict[int, list[float]]]) -> None:
    answered = [sample_id for answer in by_rank for sample_id in answer]
    assert sorted(answered) == sorted(wanted), "every sample is answered for by one rank"
    given = {sample_id: values for answer in by_rank for sample_id, values in answer.items()}
    assert max(abs(a - b) for key, values in wanted.items() for a, b in zip(values, given[key], strict=True)) <= 1e-4


def check_metrics(one: Seen, ranks: list[Seen]) -> None:
    assert one.metrics[0]["loss"] != pytest.approx(one.metrics[1]["loss"], rel=1e-3)
    for step, wanted in enumerate(one.metrics):
        # What another rank runs to stay in step has no weight, and the last stage knows the loss.
        knowing = [seen.metrics[step] for seen in ranks if "loss" in seen.metrics[step]]
        assert knowing
        for found in knowing:
            assert found == pytest.approx(wanted, rel=2e-5, abs=1e-6)
