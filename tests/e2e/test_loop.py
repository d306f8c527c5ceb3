"""The whole loop on the real engines: DAPO with dynamic sampling and refill, GRPO with a reference, saving, continuing, every metric."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.models.weight_files import read_weights, recognise
from mindspeed_mm_rl.sinks import read_records
from mindspeed_mm_rl.trainer import build
from tests.plans import whole_plan

TIMINGS = (
    "all", "update", "rollout", "old_log_p", "reference_model", "resharding_to_infer", "resharding_to_train", "adv",
    "non_overlap_reference_model", "non_overlap_adv", "non_overlap_rule_reward", "non_overlap_reward_model", "rule_reward",
    "reward_model", "ref_onload", "ref_offload", "kl", "onload", "offload", "vit_image_emb", "image_embeds",
    "resharding_enter_infer", "resharding_exit_infer",
)  # fmt: skip
SPREAD = ("mean", "max", "min")


def documented_names(algorithm: str) -> set[str]:
    names = {f"timing/{phase}" for phase in TIMINGS}
    names |= {
        f"{base}/{kind}" for base in (f"{algorithm}/score", f"{algorithm}/rewards", "response_length", "prompt_length") for kind in SPREAD
    }
    names |= {f"actor/{name}" for name in ("entropy", "kl_loss", "pg_loss", "pg_clipfrac", "ppo_kl", "lr", "grad_norm")}
    names |= {f"{algorithm}/lr", "grad_norm", "train/num_gen_batches", "e2e_tps", "update_tps", "vllm_tps"}
    names |= {f"tool_call_num/{kind}" for kind in SPREAD}
    return names | {f"{verifier}_rewards/mean" for verifier in ("geo3k", "geo3k_acc", "geo3k_format")}


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows: a picture, two pictures, none, in turn."""
    rng = np.random.default_rng(5)

    def picture() -> dict[str, Any]:
        width, height = (int(side) for side in rng.integers(40, 130, 2))
        encoded = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(encoded, "PNG")
        return {"bytes": encoded.getvalue(), "path": None}

    rows = []
    for index in range(24):
        images = [picture() for _ in range((1, 2, 0)[index % 3])]
        extra = {"split": "train", "index": index, "answer": str(index), "question": "Find x."}
        rows.append({
            "data_source": "hiyouga/geometry3k",
            "prompt": [{"role": "user", "content": "<image>" * len(images) + f"Find x, number {index}."}],
            "images": images,
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(index)},
            "extra_info": extra,
        })  # fmt: skip
    path = tmp_path_factory.mktemp("rows") / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def dapo(plan: Plan) -> Plan:
    """Random models are never right: the overlong penalty alone makes rewards differ, so most groups are filtered out and refilled."""
    return replace(
        plan,
        run=replace(plan.run, train_iters=3, prompts_per_generation=8, samples_per_prompt=8, save_interval=2, keep_last=1),
        reward=replace(plan.reward, overlong_buffer=20),
        recipe=replace(plan.recipe, filter_groups=True, filter_max_batches=-1, train_prompts=3),
    )


def grpo(plan: Plan) -> Plan:
    recipe = replace(plan.recipe, algorithm="grpo", clip_ratio_high=0.2, kl_coef=0.01, entropy_coeff=0.001, token_level_loss=False)
    return replace(
        plan,
        run=replace(plan.run, epochs=2, shuffle_mini_batch=True),
        train=replace(plan.train, freeze_vision=False, freeze_projector=False),
        rollout=replace(plan.rollout, image_embeds=False),
        reward=replace(plan.reward, overlong_buffer=20),
        recipe=recipe,
    )


def check_records(records: list[dict[str, float]], algorithm: str) -> None:
    for record in records:
        assert documented_names(algorithm) <= record.keys()
        assert record["rollout/logprob_gap/max"] <= 1e-4
        parts = ("rollout", "old_log_p", "update", "reference_model", "resharding_to_train", "resharding_to_infer")
        non_overlap = max(record[f"timing/non_overlap_{name}"] for name in ("reference_model", "adv", "rule_reward", "reward_model"))
        assert record["timing/all"] >= sum(record[f"timing/{part}"] for part in parts) + (non_overlap if algorithm == "dapo" else 0.0)


def check_throughput(record: dict[str, float], plan: Plan) -> None:
    """tps recomputed from the file: (mean response + mean prompt) * prompts * samples / devices / seconds."""
    tokens = (record["response_length/mean"] + record["prompt_length/mean"]) * plan.run.samples_per_prompt / plan.run.num_devices
    generated = tokens * plan.run.prompts_per_generation * record["train/num_gen_batches"]
    assert record["e2e_tps"] == pytest.approx(generated / record["timing/all"])
    assert record["vllm_tps"] == pytest.approx(generated / record["timing/rollout"])
    assert record["update_tps"] == pytest.approx(tokens * plan.recipe.train_prompts / record["timing/update"])


def test_dapo_on_two_devices_filters_refills_saves_and_continues(tiny_vl: Path, parquet: Path, tmp_path: Path) -> None:
    plan = dapo(whole_plan(tiny_vl, parquet, tmp_path))
    plan = replace(plan, run=replace(plan.run, num_devices=2))
    build.run(plan)
    records = read_records(tmp_path / "logs" / "metrics.jsonl")
    assert [record["iteration"] for record in records] == [1, 2, 3]
    check_records(records, "dapo")
    for record in records:
        check_throughput(record, plan)
        assert record["train/num_samples"] == 24
        assert record["dapo/score/max"] > record["dapo/score/min"]
    assert any(record["train/num_gen_batches"] > 1 for record in records)
    assert all((tmp_path / "logs" / name).is_file() for name in ("curves.png", "table.txt"))
    saves = sorted(path.name for path in (tmp_path / "save").iterdir())
    assert saves == ["iter_0000003", "latest_checkpointed_iteration.txt"]
    state = json.loads((tmp_path / "save" / "iter_0000003" / "state.json").read_text())
    assert state["data"]["prompts"] == sum(record["train/num_gen_batches"] for record in records) * 8
    _continue(plan, tmp_path)


def _continue(plan: Plan, tmp_path: Path) -> None:
    more = replace(plan, run=replace(plan.run, train_iters=4), train=replace(plan.train, load=str(tmp_path / "save")))
    before = dict(read_weights(tmp_path / "save"))
    build.run(more)
    records = read_records(tmp_path / "logs" / "metrics.jsonl")
    assert [record["iteration"] for record in records] == [1, 2, 3, 4]
    assert records[3]["rollout/logprob_gap/max"] <= 1e-4
    found = recognise(tmp_path / "save")
    assert found.iteration == 4
    after = read_weights(tmp_path / "save")
    moved = [name for name, tensor in before.items() if not tensor.equal(after[name])]
    assert moved and all(name.startswith("text_decoder.") for name in moved), "a frozen vision encoder must not move"


def test_grpo_with_reference_trains_the_vision_encoder_too(tiny_vl: Path, parquet: Path, tmp_path: Path) -> None:
    plan = grpo(whole_plan(tiny_vl, parquet, tmp_path))
    build.run(plan)
    records = read_records(tmp_path / "logs" / "metrics.jsonl")
    check_records(records, "grpo")
    check_throughput(records[0], plan)
    assert records[0]["train/num_updates"] == 4
    assert all(record["actor/kl_loss"] > 0 for record in records)
    before, after = read_weights(tiny_vl), read_weights(tmp_path / "save")
    patch_embed = "visual.patch_embed.proj.weight", "image_encoder.encoder.patch_embed.proj.weight"
    assert not before[patch_embed[0]].equal(after[patch_embed[1]])
