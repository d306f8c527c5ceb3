"""DPO through the whole loop on the real engine: it learns, goes on after a stop bit for bit, sees pictures, and ends in one sentence."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.models.weight_files import read_weights
from mindspeed_mm_rl.sinks import read_records
from mindspeed_mm_rl.trainer import build
from mindspeed_mm_rl.trainer.evaluate import without_training
from tests.continuation import check_same, dpo, stopped_and_resumed, straight
from tests.data_files import png, row, write_rows
from tests.plans import eval_plan, optimizer_plan, pairs_plan
from tests.tiny import make_tiny_text

LETTERS = "abcdefgh"
HELD_OUT = 32
LOGGED = {
    "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
    "actor/grad_norm", "grad_norm", "actor/lr", "dpo/lr", "train/epoch", "train/num_pairs", "samples_per_second", "e2e_tps", "update_tps",
    "data/pairs", "data/rows", "data/too_long", "reference/computed_pairs", "timing/all", "timing/reference_model", "timing/update",
    "eval/held_out/loss", "eval/held_out/rewards/accuracies", "eval/held_out/rewards/margins", "timing/eval",
}  # fmt: skip


def letter_pairs(path: Path, count: int) -> Path:
    """The right response says the letter that the prompt says; the wrong one another."""
    rng, lines = random.Random(0), []
    for number in range(count):
        right, wrong = rng.sample(LETTERS, 2)
        lines.append(json.dumps({"prompt": f"{number}: find {right}.", "chosen": right, "rejected": wrong}))
    path.write_text("\n".join(lines) + "\n")
    return path


def learning(folder: Path, output: Path) -> Plan:
    """40 iterations of 16 pairs, which is about six epochs."""
    plan = pairs_plan(folder, letter_pairs(output / "train.jsonl", 96 + HELD_OUT), output, beta=0.5)
    return replace(
        plan,
        run=replace(plan.run, train_iters=40, save_interval=20, prompts_per_generation=16, mini_batch_prompts=16),
        train=replace(plan.train, optimizer=optimizer_plan(lr=2e-3, warmup_updates=4)),
        data=replace(plan.data, row_slice=(None, -HELD_OUT)),
        eval=eval_plan(Path(plan.data.train_path), held_out_rows=HELD_OUT, interval=10, at_start=True),
    )


def test_a_rule_is_learned_the_reference_asked_once_and_the_save_evaluated_as_in_training(tiny_text: Path, tmp_path: Path) -> None:
    plan = learning(tiny_text, tmp_path)
    build.run(plan)
    before, *records = read_records(tmp_path / "logs" / "metrics.jsonl")
    assert [record["iteration"] for record in records] == list(range(1, 41))
    assert records[-1].keys() >= LOGGED
    assert before["eval/held_out/rewards/margins"] == 0 and before["eval/held_out/loss"] == pytest.approx(0.6931, abs=1e-4)
    last = records[-1]
    assert sum(record["rewards/accuracies"] for record in records[-5:]) / 5 > 0.9
    assert last["eval/held_out/rewards/accuracies"] > 0.9 and last["eval/held_out/rewards/margins"] > 0.5
    assert [record["reference/computed_pairs"] for record in records] == [16] * 6 + [0] * 34
    assert all((tmp_path / "logs" / name).is_file() for name in ("curves.png", "table.txt"))
    assert (tmp_path / "save" / "best_checkpointed_iteration.txt").read_text().strip() in ("20", "40")
    trained = replace(plan, train=replace(plan.train, load=str(tmp_path / "save"), reference_load=str(tiny_text)))
    values = build.evaluate(without_training(trained))
    assert values["eval/held_out/rewards/margins"] == pytest.approx(last["eval/held_out/rewards/margins"], rel=1e-5)
    with pytest.raises(ValueError, match="ref_model is missing"):
        without_training(replace(trained, train=replace(trained.train, reference_load=trained.train.load)))


def test_experts_that_two_devices_share_learn_from_pairs(tmp_path: Path) -> None:
    model = make_tiny_text(tmp_path / "model", family="qwen3_moe")
    plan = pairs_plan(model, letter_pairs(tmp_path / "train.jsonl", 16), tmp_path, beta=0.5)
    run = replace(plan.run, num_devices=2, train_iters=6, prompts_per_generation=16, mini_batch_prompts=16)
    build.run(replace(plan, run=run, train=replace(plan.train, expert_parallel_size=2)))
    records = read_records(tmp_path / "logs" / "metrics.jsonl")
    assert records[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and records[-1]["loss"] < 0.5
    assert records[-1]["rewards/accuracies"] > 0.9


def picture_pairs(path: Path) -> Path:
    """17 rows: a picture, two pictures, none, in turn."""
    rows = []
    for number in range(17):
        images = [png(42 + 14 * (number % 5), 56 + 14 * k, seed=10 * number + k) for k in range((1, 2, 0)[number % 3])]
        answers = {"chosen": f"It is {number}.", "rejected": f"It is {number + 1}, I think."}
        rows.append(row(text="<image>" * len(images) + f"Find x, number {number}.", images=images, **answers))
    return write_rows(path, rows)


def test_a_stop_changes_nothing_also_with_pictures_and_two_devices(tiny_vl: Path, tmp_path: Path) -> None:
    rows = picture_pairs(tmp_path / "train.parquet")
    results = []
    for way, name in ((straight, "straight"), (stopped_and_resumed, "stopped")):
        plan = dpo(pairs_plan(tiny_vl, rows, tmp_path / name))
        results.append(way(replace(plan, run=replace(plan.run, num_devices=2), eval=eval_plan(rows))))
    check_same(*results)
    # 0, 3, 6, ... have one picture, 1, 4, 7, ... two.
    assert results[0].records[0]["vision/images"] == results[0].records[0]["vision/images_encoded"] > 0
    assert [record["reference/computed_pairs"] for record in results[0].records] == [6, 6, 0, 0]


@pytest.mark.parametrize(
    ("colocated", "frozen"), [(False, False), (True, False), (True, True)], ids=["trained_inside", "trained_workers", "frozen_workers"]
)
def test_the_vision_encoder_may_be_trained_and_stand_apart(tiny_vl: Path, tmp_path: Path, colocated: bool, frozen: bool) -> None:
    plan = pairs_plan(tiny_vl, picture_pairs(tmp_path / "train.parquet"), tmp_path, cache_reference=False)
    train = replace(plan.train, freeze_vision=frozen, freeze_projector=frozen)
    vision = replace(train, rows_together=1) if colocated else None
    plan = replace(plan, train=replace(train, with_vision=not colocated), rollout=replace(plan.rollout, image_embeds=frozen), vision=vision)
    build.run(plan)
    records = read_records(tmp_path / "logs" / "metrics.jsonl")
    assert records[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and records[1]["loss"] < records[0]["loss"]
    assert (records[0]["vision/images_encoded"] > 0) == frozen
    save = tmp_path / "save" / "iter_0000002"
    after = read_weights(save / "vision" if colocated else save)["image_encoder.encoder.patch_embed.proj.weight"]
    assert torch.equal(after, read_weights(tiny_vl)["visual.patch_embed.proj.weight"]) == frozen
