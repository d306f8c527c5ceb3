"""Real Geometry3K pictures and the real Qwen2.5 tokenizer through data preparation and two DAPO iterations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import transformers

from mindspeed_mm_rl.sinks import read_records
from mindspeed_mm_rl.trainer import build
from tests.data_files import VL_TEMPLATE, run_geo3k
from tests.plans import whole_plan
from tests.tiny import make_tiny_vl

MAX_TOKENS = 32


def make_model(data_dir: Path, folder: Path) -> Path:
    tokenizer = transformers.AutoTokenizer.from_pretrained(data_dir / "tokenizer_qwen25")
    tokenizer.chat_template = VL_TEMPLATE
    # Tied: the real vocabulary has 151,643 tokens, most of a tiny model.
    return make_tiny_vl(folder, tokenizer=tokenizer, hidden=64, heads=2, intermediate=128, tied=True)


def test_two_dapo_iterations_on_real_pictures(data_dir: Path, tmp_path: Path) -> None:
    assert run_geo3k("--local_data", data_dir / "geometry3k", "--local_dir", tmp_path / "geo3k") == 0
    model = make_model(data_dir, tmp_path / "model")
    plan = whole_plan(model, tmp_path / "geo3k", tmp_path)
    plan = replace(
        plan,
        run=replace(plan.run, prompts_per_generation=8),
        data=replace(plan.data, max_prompt_length=512, num_workers=2),
        rollout=replace(plan.rollout, max_tokens=MAX_TOKENS, max_model_len=512 + MAX_TOKENS),
        reward=replace(plan.reward, max_tokens=MAX_TOKENS),
        recipe=replace(plan.recipe, train_prompts=8),
    )
    build.run(plan)
    records = read_records(tmp_path / "logs" / "metrics.jsonl")
    assert [record["iteration"] for record in records] == [1, 2]
    # The batch is built only when every sample's image tokens equal its grids and the rollout engine's own count.
    assert [record["train/num_samples"] for record in records] == [32, 32]
    assert max(record["rollout/logprob_gap/max"] for record in records) <= 1e-4
    assert all(record["prompt_length/min"] > 60 for record in records), "pictures and instruction make a prompt long"
    state = json.loads((tmp_path / "save" / "iter_0000002" / "state.json").read_text())
    assert state["data"]["prompts"] == 16 and state["data"]["bad_rows"] == 0
