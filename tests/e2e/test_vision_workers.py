"""The vision encoder in workers of its own through the whole loop: the numbers of an encoder inside the actor, under another layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.models.weight_files import read_config
from mindspeed_mm_rl.models.weight_sources import source_of
from tests.continuation import (
    Result,
    check_same,
    compared,
    continuation_plan,
    dapo_with_refill,
    grpo_with_kl,
    picture_rows,
    ppo_with_kl,
    resumed_from,
    straight,
)
from tests.data_files import png, row, write_rows

NUM_PICTURES, PATCHES = 4, "visual.patch_embed.proj.weight"


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 rows that look at four pictures over and over: one, two, or none."""
    pool, rows = [png(42 + 14 * k, 56 + 28 * k, seed=k) for k in range(NUM_PICTURES)], []
    for number in range(14):
        images = [pool[(number + k) % NUM_PICTURES] for k in range((1, 2, 0)[number % 3])]
        rows.append(row(text="<image>" * len(images) + f"Find x, number {number}.", images=images, answer=str(number)))
    return write_rows(tmp_path_factory.mktemp("rows") / "train.parquet", rows)


def short(plan: Plan) -> Plan:
    return replace(plan, run=replace(plan.run, train_iters=2, save_interval=1))


def apart(plan: Plan, **layout: Any) -> Plan:
    critic = plan.critic and replace(plan.critic, with_vision=not plan.rollout.image_embeds)
    return replace(plan, train=replace(plan.train, with_vision=False), vision=replace(plan.train, **layout), critic=critic)


def trained(plan: Plan) -> Plan:
    # Adam would go as far by rounding errors as by gradients where these are about 0, as those of a KL term are at first.
    optimizer = replace(plan.train.optimizer, adam_eps=1e-4)
    plan = replace(plan, train=replace(plan.train, freeze_vision=False, freeze_projector=False, optimizer=optimizer))
    return replace(plan, rollout=replace(plan.rollout, image_embeds=False))


def check_same_run(inside: Result, outside: Result) -> None:
    """The same samples, and the same numbers up to the order of sums."""
    for left, right in zip(inside.batches, outside.batches, strict=True):
        assert left.sample_ids == right.sample_ids and left.responses.values.equal(right.responses.values)
    for left, right in zip(inside.records, outside.records, strict=True):
        assert right["rollout/logprob_gap/max"] <= 1e-4
        expected, found = compared(left), compared(right)
        # A ratio of sums that is 0 but for rounding.
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_frozen_encoder_sees_each_picture_once_an_iteration(tiny_vl: Path, repeated: Path, tmp_path: Path) -> None:
    def plan(name: str) -> Plan:
        return short(dapo_with_refill(continuation_plan(tiny_vl, repeated, tmp_path / name, num_devices=2)))

    inside, outside = straight(plan("inside")), straight(apart(plan("apart"), tensor_parallel_size=2))
    check_same_run(inside, outside)
    for record in outside.records:
        assert record["train/num_gen_batches"] > 1
        assert record["vision/images_encoded"] == record["vision/images"] == NUM_PICTURES
    config = read_config(tiny_vl)
    before, save = source_of(tiny_vl, config), source_of(plan("apart").run.save, config)
    moved = {name for name in save.shapes if not save[name].equal(before[name])}
    assert moved and not any(name.startswith("visual.") for name in moved)


def test_a_trained_encoder_is_updated_as_one_with_the_actor(tiny_vl: Path, repeated: Path, tmp_path: Path) -> None:
    """The rollout engine gets its weights from two groups of processes: its log-probs would tell if one were old."""

    def plan(name: str) -> Plan:
        whole = trained(short(grpo_with_kl(continuation_plan(tiny_vl, repeated, tmp_path / name, num_devices=2))))
        return replace(whole, run=replace(whole.run, samples_per_prompt=12))

    inside, outside = straight(plan("inside")), straight(apart(plan("apart"), tensor_parallel_size=2))
    check_same_run(inside, outside)
    assert outside.records[1]["actor/kl_loss"] > 0 and all(record["actor/grad_norm"] > 0.1 for record in outside.records)
    config = read_config(tiny_vl)
    start, ours, theirs = (source_of(folder, config) for folder in (tiny_vl, plan("inside").run.save, plan("apart").run.save))
    for name in start.shapes:
        assert (theirs[name] - ours[name]).abs().max() <= 1e-5, name
    assert not theirs[PATCHES].equal(start[PATCHES])


def test_neither_a_stop_nor_the_way_of_the_weights_changes_anything(tiny_vl: Path, tmp_path: Path) -> None:
    rows = picture_rows(tmp_path / "train.parquet")

    def plan(name: str) -> Plan:
        return apart(trained(short(grpo_with_kl(continuation_plan(tiny_vl, rows, tmp_path / name, num_devices=1)))))

    one, other = straight(plan("straight")), plan("resumed")
    other = replace(other, rollout=replace(other.rollout, weight_carrier="device"))
    check_same(one, resumed_from(plan("straight"), other, 1, one.batches))


def test_ppo_shares_a_frozen_encoder_with_its_critic(tiny_vl: Path, repeated: Path, tmp_path: Path) -> None:
    def plan(name: str) -> Plan:
        return short(ppo_with_kl(continuation_plan(tiny_vl, repeated, tmp_path / name, num_devices=1)))

    check_same_run(straight(plan("inside")), straight(apart(plan("apart"))))
