"""The vision encoder outside of the actor, on one process: features, and where its weights come from."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_mm_rl.algorithms.losses import PolicyLossSettings, clipped_policy_loss
from mindspeed_mm_rl.models.weight_files import read_config, read_megatron_weights
from mindspeed_mm_rl.models.weight_layout import to_megatron
from mindspeed_mm_rl.models.weight_sources import source_of
from mindspeed_mm_rl.types import Batch, ImageInput
from tests.checkpoints import make_training_save
from tests.convert.converting import run
from tests.pictures import batch_of, features_by_hugging_face, gradients_by_hugging_face, pictures, request_of
from tests.plans import optimizer_plan, train_plan


@pytest.fixture(scope="module")
def images(tiny_vl: Path) -> dict[str, ImageInput]:
    return pictures(tiny_vl)


@pytest.fixture(scope="module")
def expected(tiny_vl: Path, images: dict[str, ImageInput]) -> dict[str, torch.Tensor]:
    return features_by_hugging_face(tiny_vl, images)


def encode(model: Path, images: dict[str, ImageInput], **changes: object) -> dict[str, torch.Tensor]:
    from mindspeed_mm_rl.engines.megatron.vision import FrozenVisionEngine

    features = FrozenVisionEngine(train_plan(model, **changes)).encode(images)
    assert [feature.grid_thw for feature in features.values()] == [image.grid_thw for image in images.values()]
    return {key: feature.embeddings for key, feature in features.items()}


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, features in expected.items():
        torch.testing.assert_close(found[key], features, atol=1e-5, rtol=0)


def test_features_equal_hugging_face(one_rank, tiny_vl, images, expected):
    check(encode(tiny_vl, images), expected)


@pytest.mark.parametrize(
    ("layout", "alone"),
    [
        ({"llm_pp_layers": [[2]], "vit_pp_layers": [[3]]}, True),
        ({"llm_pp_layers": [[2]], "vit_pp_layers": [[3]], "tp_size": 2}, True),
        ({"llm_pp_layers": [[1, 1]], "vit_pp_layers": [[2, 1]]}, True),
        ({"llm_pp_layers": [[1, 1]], "vit_pp_layers": [[1, 2]], "tp_size": 2}, False),
    ],
    ids=["alone", "alone-tp2", "alone-over-two-stages", "whole-over-two-stages-tp2"],
)
def test_converted_encoders_load_from_every_layout(one_rank, tiny_vl, tmp_path, images, expected, layout, alone):
    parallel = {f"parallel_config.{key}": value for key, value in layout.items()}
    assert run("hf_to_mm", mm_dir=tmp_path / "mm", **{"hf_config.hf_dir": tiny_vl}, save_vit_only=alone, **parallel) == 0
    check(encode(tiny_vl, images, load=str(tmp_path / "mm")), expected)


def test_an_encoder_alone_is_no_policy(tiny_vl, tmp_path):
    parallel = {"parallel_config.llm_pp_layers": [[2]], "parallel_config.vit_pp_layers": [[3]]}
    assert run("hf_to_mm", mm_dir=tmp_path / "mm", **{"hf_config.hf_dir": tiny_vl}, save_vit_only=True, **parallel) == 0
    with pytest.raises(ValueError, match="holds the vision encoder alone: that is for vit_config.load"):
        source_of(tmp_path / "mm", read_config(tiny_vl))


def test_a_save_of_actor_and_vision_workers_is_one_model(one_rank, tiny_vl, tmp_path, images, expected):
    """Each of the two has its part in a folder of its own."""
    from mindspeed_mm_rl.engines.megatron.vision import FrozenVisionEngine

    config = read_config(tiny_vl)
    whole = read_megatron_weights(tiny_vl, config)
    save = make_training_save(tmp_path / "save", {name: tensor for name, tensor in whole.items() if name.startswith("text_decoder.")})
    with pytest.raises(ValueError, match="missing"):
        read_megatron_weights(save, config)
    vision = save / "iter_0000010" / "vision"
    vision.mkdir()
    FrozenVisionEngine(train_plan(tiny_vl)).save(vision)
    found = read_megatron_weights(save, config)
    assert found.keys() == whole.keys() and all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    check(encode(tiny_vl, images, load=str(save)), expected)
    check(encode(tiny_vl, images, load=str(vision)), expected)
    assert run("mm_to_hf", save_hf_dir=tmp_path / "hf", mm_dir=save, **{"hf_config.hf_dir": tiny_vl}) == 0
    exported = source_of(tmp_path / "hf", config)
    original = source_of(tiny_vl, config)
    assert all(torch.equal(exported[name], original[name]) for name in original.shapes)


def test_a_text_model_has_no_encoder(one_rank, tiny_text):
    with pytest.raises(ValueError, match="a qwen2 model has no vision encoder"):
        encode(tiny_text, {})


TRAINED = {"freeze_vision": False, "freeze_projector": False}
GRPO = functools.partial(clipped_policy_loss, settings=PolicyLossSettings(0.2, 0.28))


@pytest.fixture(scope="module")
def batch(tiny_vl: Path, images: dict[str, ImageInput]) -> Batch:
    return batch_of(tiny_vl, images)


def apart(model: Path, **changes: object) -> tuple[Any, Any]:
    """An actor without a vision encoder, and the encoder."""
    from mindspeed_mm_rl.engines.megatron.engine import MegatronTrainEngine
    from mindspeed_mm_rl.engines.megatron.vision import TrainedVisionEngine

    plan = train_plan(model, **TRAINED | changes)
    actor = MegatronTrainEngine(replace(plan, with_vision=False), False, False, publish_vision=False)
    return actor, TrainedVisionEngine(plan, with_reference=True)


def update_apart(actor: Any, vision: Any, batch: Batch, images: dict[str, ImageInput]) -> dict[str, float]:
    metrics, gradients = actor.gradients(request_of(batch), vision.encode(images), GRPO)
    norm = math.hypot(metrics["grad_norm"], vision.backward(images, [gradients]))
    vision.step(norm)
    return metrics | actor.step(norm)


def gradients_of(engine: Any) -> dict[str, torch.Tensor]:
    return {name: p.main_grad.clone() for name, p in engine.network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("samples", [0, 1], ids=["one-micro-batch", "a-micro-batch-per-sample"])
def test_both_placements_have_the_gradients_of_hugging_face(one_rank, tiny_vl, batch, images, samples):
    from mindspeed_mm_rl.engines.megatron.engine import MegatronTrainEngine

    changes = {"optimizer": optimizer_plan(clip_grad=0.0), "max_samples_per_micro_batch": samples}
    inside = MegatronTrainEngine(train_plan(tiny_vl, **TRAINED | changes), False, False, publish_vision=True)
    metrics = inside.update(request_of(batch), images, GRPO)
    actor, vision = apart(tiny_vl, **changes)
    assert update_apart(actor, vision, batch, images) == pytest.approx(metrics, rel=1e-5, abs=1e-7)
    expected = to_megatron(gradients_by_hugging_face(tiny_vl, batch, images), read_config(tiny_vl))
    for placement in (gradients_of(inside), gradients_of(actor) | gradients_of(vision)):
        assert placement.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.norm() > 0 and (placement[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_two_clipped_updates_are_those_of_an_encoder_inside(one_rank, tiny_vl, batch, images):
    """The norm is that of both networks, so each is clipped by what the other has too; the learning rates move together."""
    from mindspeed_mm_rl.engines.megatron.engine import MegatronTrainEngine

    changes = {"optimizer": optimizer_plan(lr=1e-4, adam_eps=1e-4, clip_grad=0.5, warmup_updates=3)}
    inside = MegatronTrainEngine(train_plan(tiny_vl, **TRAINED | changes), False, False, publish_vision=True)
    actor, vision = apart(tiny_vl, **changes)
    for _ in range(2):
        metrics = inside.update(request_of(batch), images, GRPO)
        assert metrics["grad_norm"] > 0.5
        assert update_apart(actor, vision, batch, images) == pytest.approx(metrics, rel=1e-5, abs=1e-7)
    both = dict(actor.network.named_parameters()) | dict(vision.network.named_parameters())
    for name, parameter in inside.network.named_parameters():
        torch.testing.assert_close(both[name], parameter, atol=2e-6, rtol=1e-5, msg=name)


def test_the_reference_keeps_the_encoder_of_the_start(one_rank, tiny_vl, batch, images):
    actor, vision = apart(tiny_vl)
    before = {key: feature.embeddings for key, feature in vision.encode(images).items()}
    update_apart(actor, vision, batch, images)
    assert all(torch.equal(feature.embeddings, before[key]) for key, feature in vision.ref_encode(images).items())
    assert all(not torch.allclose(feature.embeddings, before[key], atol=1e-3) for key, feature in vision.encode(images).items())


def test_a_batch_without_pictures_moves_the_encoder_as_far_as_its_momentum_goes(one_rank, tiny_vl, batch, images):
    text = batch.select([4, 5])
    actor, vision = apart(tiny_vl)
    start = {name: tensor.clone() for name, tensor in vision.network.weights().items()}
    update_apart(actor, vision, text, {})
    assert all(torch.equal(tensor, start[name]) for name, tensor in vision.network.weights().items())
    update_apart(actor, vision, batch, images)
    moved = {name: tensor.clone() for name, tensor in vision.network.weights().items()}
    update_apart(actor, vision, text, {})
    assert not any(torch.equal(tensor, moved[name]) for name, tensor in vision.network.weights().items())


def test_a_save_of_both_continues_bit_by_bit(one_rank, tiny_vl, batch, images, tmp_path):
    actor, vision = apart(tiny_vl)
    update_apart(actor, vision, batch, images)
    for name, engine in (("actor", actor), ("vision", vision)):
        (tmp_path / name).mkdir()
        engine.save(tmp_path / name)
    straight = update_apart(actor, vision, batch, images)
    others = apart(tiny_vl)
    for name, engine in zip(("actor", "vision"), others, strict=True):
        engine.load(tmp_path / name)
    assert update_apart(*others, batch, images) == straight
    for engine, other in zip((actor, vision), others, strict=True):
        for name, tensor in engine.network.weights().items():
            assert torch.equal(other.network.weights()[name], tensor), name
