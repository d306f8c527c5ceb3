"""DAPO on pictures: actor on two tensor-parallel ranks, vision workers beside it, two rollout replicas, and the curve of one process."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.sinks import read_records
from mindspeed_mm_rl.trainer import build
from tests.continuation import continuation_plan, dapo_with_refill, picture_rows
from tests.plans import optimizer_plan

ITERATIONS, SECONDS = 10, 900
pytestmark = pytest.mark.timeout(2 * SECONDS)


def run(plan: Plan) -> list[dict[str, float]]:
    optimizer = optimizer_plan(lr=1e-3, adam_eps=1e-5)
    shared = replace(plan.run, train_iters=ITERATIONS, save_interval=ITERATIONS)
    build.run(replace(plan, run=shared, train=replace(plan.train, optimizer=optimizer)))
    return read_records(Path(plan.run.output) / "metrics.jsonl")


def test_ten_iterations_have_the_curve_of_one_process(tiny_vl: Path, tmp_path: Path) -> None:
    rows = picture_rows(tmp_path / "train.parquet")
    one = run(dapo_with_refill(continuation_plan(tiny_vl, rows, tmp_path / "one", num_devices=1)))
    spread = dapo_with_refill(continuation_plan(tiny_vl, rows, tmp_path / "spread", num_devices=2))
    actor = replace(spread.train, tensor_parallel_size=2, with_vision=False)
    start = time.monotonic()
    several = run(replace(spread, train=actor, vision=spread.train))
    assert time.monotonic() - start <= SECONDS
    assert len(one) == len(several) == ITERATIONS
    for left, right in zip(one, several, strict=True):
        print([f"{name}: {left[name]:.5g} {right[name]:.5g}" for name in ("rollout/reward/mean", "actor/grad_norm", "vision/images")])
        assert right["rollout/logprob_gap/max"] <= 1e-4
        assert right["vision/images_encoded"] == right["vision/images"] > 0
        # Sums in another order: a token in some thousands is drawn otherwise in the end, and what follows it.
        assert right["rollout/reward/mean"] == pytest.approx(left["rollout/reward/mean"], abs=0.02)
    for name in ("rollout/reward/mean", "actor/grad_norm", "response_length/mean"):
        assert several[0][name] == pytest.approx(one[0][name], rel=1e-4), name
