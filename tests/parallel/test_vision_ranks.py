"""Vision workers under layouts of their own: the features and the gradients of one process, and of Hugging Face."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.parallel.vision_ranks import features, gradients_by_features, gradients_by_weights
from tests.pictures import batch_of, features_by_hugging_face, gradients_by_hugging_face, pictures
from tests.plans import optimizer_plan, train_plan
from tests.rank_pool import RankPool

TRAINED = {"freeze_vision": False, "freeze_projector": False, "optimizer": optimizer_plan(clip_grad=0.0), "max_samples_per_micro_batch": 2}
VISION = {"one": (1, {}), "TP2": (2, {"tensor_parallel_size": 2}), "DP2": (2, {})}
ACTORS = {
    "DP2": (2, {}),
    "TP2+SP": (2, {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_parallel_size": 2}),
    "CP2": (2, {"context_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(seconds=120) as pool:
        yield pool


@pytest.fixture(scope="module")
def encoded(ranks: RankPool, tiny_vl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features of one process."""
    file = tmp_path_factory.mktemp("features") / "one"
    ranks.run(1, features, train_plan(tiny_vl), file)
    return Path(f"{file}.0")


@pytest.mark.parametrize("layout", VISION)
def test_features_do_not_depend_on_the_layout(ranks, tiny_vl, tmp_path, layout):
    world, changes = VISION[layout]
    ranks.run(world, features, train_plan(tiny_vl, **changes), tmp_path / "out")
    expected, found = features_by_hugging_face(tiny_vl, pictures(tiny_vl)), {}
    for rank in range(world):
        for key, value in torch.load(f"{tmp_path}/out.{rank}", weights_only=True).items():
            torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=0)
            found[key] = value
    assert found.keys() == expected.keys()


def tables_of(ranks: RankPool, model: Path, encoded: Path, folder: Path, layout: tuple[int, dict]) -> tuple[list[dict], float]:
    """Gradients by features of each rank of the actor, and the norm of those by its own weights."""
    world, changes = layout
    plan = train_plan(model, with_vision=False, **TRAINED | changes)
    answers = ranks.run(world, gradients_by_features, plan, encoded, folder / "table")
    assert len({norm for norm, _ in answers}) == 1
    return [torch.load(f"{folder}/table.{rank}", weights_only=True) for rank in range(world)], answers[-1][0]


def summed(tables: list[dict]) -> dict[str, torch.Tensor]:
    return {key: sum(table[key] for table in tables if key in table) for table in tables for key in table}


@pytest.fixture(scope="module")
def one_actor(ranks, tiny_vl, encoded, tmp_path_factory) -> tuple[list[dict], float]:
    return tables_of(ranks, tiny_vl, encoded, tmp_path_factory.mktemp("one"), (1, {}))


@pytest.mark.parametrize("layout", ACTORS)
def test_gradients_by_features_do_not_depend_on_the_actors_layout(ranks, tiny_vl, encoded, one_actor, tmp_path, layout):
    tables, norm = tables_of(ranks, tiny_vl, encoded, tmp_path, ACTORS[layout])
    expected, found = summed(one_actor[0]), summed(tables)
    assert norm == pytest.approx(one_actor[1], rel=1e-5)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.norm() > 0 and (found[key] - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("layout", VISION)
def test_gradients_of_the_encoder_are_those_of_hugging_face(ranks, tiny_vl, encoded, tmp_path, layout):
    """The actor on two data-parallel ranks, each with pictures of its own and one that both have."""
    images = pictures(tiny_vl)
    expected = gradients_by_hugging_face(tiny_vl, batch_of(tiny_vl, images), images)
    tables, actor_norm = tables_of(ranks, tiny_vl, encoded, tmp_path, ACTORS["DP2"])
    world, changes = VISION[layout]
    norms = ranks.run(world, gradients_by_weights, train_plan(tiny_vl, **TRAINED | changes), tables, tmp_path / "out")
    total = math.sqrt(sum(float(gradient.norm()) ** 2 for gradient in expected.values()))
    assert all(math.hypot(actor_norm, norm) == pytest.approx(total, rel=1e-4) for norm in norms)
    parts = [torch.load(f"{tmp_path}/out.{rank}", weights_only=True) for rank in range(world)]
    for name in parts[0]:
        # What a rank doesn't have is not a number.
        stacked = torch.stack([part[name] for part in parts])
        whole, gradient = stacked.nanmean(0), expected[name]
        assert gradient.norm() > 0 and (whole - gradient).norm() <= 1e-4 * gradient.norm(), name
