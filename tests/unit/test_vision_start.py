"""Where vision workers begin: their weights at the start and after a save, and what cannot be continued or compared."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mindspeed_mm_rl.cli.preflight import preflight
from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.models.weight_files import read_config
from mindspeed_mm_rl.models.weight_sources import source_of
from mindspeed_mm_rl.trainer.resume import start_of
from mindspeed_mm_rl.trainer.state import save_bytes
from tests.data_files import row, write_rows
from tests.plans import whole_plan
from tests.saves import make_saves
from tests.tiny import make_tiny_vl


@pytest.fixture
def plan(tiny_vl: Path, tmp_path: Path) -> Plan:
    """6 iterations with a frozen encoder in workers of its own; no KL term."""
    data = write_rows(tmp_path / "train.parquet", [row(text=f"Is it {number}?", images=[]) for number in range(6)])
    plan = whole_plan(tiny_vl, data, tmp_path)
    plan = replace(plan, run=replace(plan.run, train_iters=6))
    return replace(plan, train=replace(plan.train, with_vision=False), vision=plan.train)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same sizes."""
    return make_tiny_vl(tmp_path_factory.mktemp("other") / "vl", seed=1)


def with_kl(plan: Plan, **changes: object) -> Plan:
    return replace(plan, recipe=replace(plan.recipe, kl_coef=0.1), train=replace(plan.train, **changes))


def trained(plan: Plan) -> Plan:
    free = {"freeze_vision": False, "freeze_projector": False}
    parts = {"train": replace(plan.train, **free), "vision": replace(plan.vision, **free)}
    return replace(plan, rollout=replace(plan.rollout, image_embeds=False), **parts)


def test_a_continued_run_takes_the_encoder_of_the_save(plan: Plan) -> None:
    saves = make_saves(plan, 2)
    start = start_of(plan)
    assert (start.plan.train.load, start.plan.vision.load) == tuple(str(saves.path_of(2) / name) for name in ("actor", "vision"))
    assert f"vision encoder: {saves.path_of(2)}/vision" in next(preflight(start))


def test_a_save_is_one_model_whatever_folder_is_named(plan: Plan) -> None:
    config = read_config(plan.train.hf_path)
    original = source_of(plan.train.load, config)
    saves = make_saves(plan, 2)
    for folder in (saves.root, saves.path_of(2), saves.path_of(2) / "actor"):
        found = source_of(folder, config)
        assert all(found[name].equal(original[name]) for name in original.shapes)


@pytest.mark.parametrize("now", [True, False])
def test_the_encoder_stays_where_the_save_has_it(plan: Plan, now: bool) -> None:
    inside = replace(plan, train=replace(plan.train, with_vision=True), vision=None)
    make_saves(inside if now else plan, 2)
    was = str(not now).lower()
    with pytest.raises(ValueError, match=rf"written with rl_config.colocate_actor_and_vit={was}, but this run has {str(now).lower()}: set"):
        start_of(plan if now else inside)


def test_what_was_frozen_is_not_trained_on(plan: Plan) -> None:
    inside = replace(plan, vision=None, train=plan.vision)
    saves = make_saves(inside, 2, plan=asdict(inside))
    freed = replace(inside, train=replace(inside.train, freeze_projector=False))
    with pytest.raises(ValueError, match=r"iter_0000002 was written with a frozen vision_projector, which this run trains \(freeze: false"):
        start_of(freed)
    assert start_of(replace(freed, train=replace(freed.train, no_load_optim=True))).save == saves.path_of(2)
    assert start_of(inside).save == saves.path_of(2)


def test_an_encoder_of_its_own_is_told(plan: Plan, other: Path) -> None:
    assert start_of(plan).notes == ()
    apart = replace(plan, vision=replace(plan.vision, load=str(other)))
    assert start_of(apart).notes == (
        f"the vision encoder is that of vit_config.load ({other}); actor_config.load ({plan.train.load}) holds another one",
    )


def test_a_folder_that_is_missing_is_named_by_its_key(plan: Plan, tmp_path: Path) -> None:
    apart = replace(plan, vision=replace(plan.vision, load=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="vit_config.load: .*/none is not a folder"):
        start_of(apart)


def test_a_frozen_encoder_serves_the_reference_too(plan: Plan, other: Path) -> None:
    assert start_of(with_kl(plan)).plan.vision.reference_load == plan.train.load
    with pytest.raises(
        ValueError, match=rf"image_encoder\.\S+ of the vision encoder in .* differs from that in {other} .*ref_model_load_path"
    ):
        start_of(with_kl(plan, reference_load=str(other)))
    # What the policy begins with is its own reference, wherever its encoder comes from.
    apart = replace(plan, vision=replace(plan.vision, load=str(other)))
    assert start_of(with_kl(apart)).plan.vision.load == str(other)


def test_a_trained_encoder_has_the_references_own_beside_it(plan: Plan, other: Path) -> None:
    chosen = start_of(with_kl(trained(plan), reference_load=str(other))).plan.vision
    assert (chosen.load, chosen.reference_load) == (plan.vision.load, str(other))
    apart = trained(replace(plan, vision=replace(plan.vision, load=str(other))))
    with pytest.raises(ValueError, match=rf"in {other} differs from that in \S+ \(actor_config.load\), with which the policy is compared"):
        start_of(with_kl(apart))


def test_an_encoder_alone_must_be_one(plan: Plan, tiny_text: Path) -> None:
    with pytest.raises(ValueError, match="vit_config.load: .*missing"):
        list(preflight(replace(start_of(plan), plan=replace(plan, vision=replace(plan.vision, load=str(tiny_text))))))


def test_a_save_takes_as_much_as_with_the_encoder_inside(plan: Plan) -> None:
    inside = replace(plan, train=replace(plan.train, with_vision=True), vision=None)
    assert save_bytes(plan) == save_bytes(inside)
    assert save_bytes(trained(plan)) > save_bytes(plan)
