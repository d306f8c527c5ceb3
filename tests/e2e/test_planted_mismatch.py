"""A fault that nobody raises: the rollout engine samples from another policy. The log-prob gap stops the run before an optimizer step."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mindspeed_mm_rl.models.weight_files import recognise
from mindspeed_mm_rl.sinks import read_records
from mindspeed_mm_rl.trainer import build
from mindspeed_mm_rl.workers import group, replicas
from tests.e2e import planted
from tests.plans import optimizer_plan, whole_plan

BOUND = 0.1
"""The default in float32."""
AGREEMENT = 1e-4


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four questions, asked in every iteration, of more than 128 tokens: only whole blocks of keys and values are kept for reuse."""
    pixels = np.random.default_rng(0).integers(0, 255, (56, 84, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    rows = []
    for index in range(4):
        images = [{"bytes": encoded.getvalue(), "path": None}] if index == 0 else []
        question = "<image>" * len(images) + f"What is {index} + {index * 7}? " * 24
        rows.append({"prompt": [{"role": "user", "content": question}], "images": images, "extra_info": {"answer": str(index)}})
    path = tmp_path_factory.mktemp("rows") / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(("rollout", "sound_iterations"), [(planted.PerturbedRollout, 1), (planted.StaleCacheRollout, 2)])
def test_the_run_stops_before_an_optimizer_step(tiny_vl, parquet, tmp_path, monkeypatch, rollout, sound_iterations):
    monkeypatch.setattr(replicas, "RolloutWorker", rollout)
    monkeypatch.setattr(group, "ActorWorker", planted.WatchedActor)
    plan = whole_plan(tiny_vl, parquet, tmp_path)
    plan = replace(
        plan,
        run=replace(plan.run, train_iters=4, save_interval=1, mini_batch_prompts=4, on_policy=True, use_tensorboard=False),
        # Every step moves the weights, and far: what old weights left in a cache differs from what the new ones would.
        recipe=replace(plan.recipe, entropy_coeff=0.1),
        train=replace(plan.train, logprob_gap_bound=BOUND, optimizer=optimizer_plan(lr=2e-2)),
        data=replace(plan.data, max_prompt_length=300),
        rollout=replace(plan.rollout, max_model_len=324),
        runtime_env=((planted.WITNESS, str(tmp_path / "witness.json")),),
    )
    with pytest.raises(
        RuntimeError, match=r"trainer and rollout engine disagree: .*logprob_gap_bound is 0\.1; nothing was updated"
    ) as error:
        build.run(plan)
    print(error.value)
    records = read_records(tmp_path / "logs" / "metrics.jsonl")
    # Until the fault the two agreed, over pushes and the same prompts again.
    assert [record["iteration"] for record in records] == list(range(1, sound_iterations + 1))
    assert all(record["rollout/logprob_gap/max"] <= AGREEMENT for record in records)
    assert all(record["grad_norm"] > 0 for record in records)
    witness = json.loads((tmp_path / "witness.json").read_text())
    assert witness["before"] == witness["after"]
    assert recognise(tmp_path / "save").iteration == sound_iterations
