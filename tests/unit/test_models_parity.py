"""The megatron policy against Hugging Face, and packed sequences against one at a time: random weights, pictures of several sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from mindspeed_mm_rl.models.families import read_architecture
from mindspeed_mm_rl.models.weight_layout import to_megatron
from mindspeed_mm_rl.types import GridTHW
from tests.hf_versions import features_of, picture_tokens

GRIDS: tuple[GridTHW, ...] = ((1, 4, 6), (1, 12, 10), (1, 8, 8))
"""Patches: within one window of 4 x 4, over cut windows, over whole windows."""


@dataclass(frozen=True)
class Row:
    tokens: list[int]
    grids: tuple[GridTHW, ...]


def load_policy(folder: Path, **options):
    from mindspeed_mm_rl.models.qwen2_5_vl import build_policy

    architecture = read_architecture(folder)
    policy = build_policy(architecture, **options).eval()
    policy.load_weights(to_megatron(load_file(folder / "model.safetensors"), architecture.raw))
    return policy


@pytest.fixture(scope="module")
def policy(one_rank, tiny_vl: Path):
    return load_policy(tiny_vl)


@pytest.fixture(scope="module")
def hf(tiny_vl: Path) -> transformers.PreTrainedModel:
    return transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_vl).float().eval()


@pytest.fixture(scope="module")
def rows(tiny_vl: Path) -> list[Row]:
    architecture = read_architecture(tiny_vl)

    def picture(grid: GridTHW) -> list[int]:
        count = grid[1] * grid[2] // 4
        return [architecture.vision_start_token_id, *[architecture.image_token_id] * count, architecture.vision_end_token_id]

    return [
        Row([20, 21, *picture(GRIDS[0]), 22, 23, 24], GRIDS[:1]),
        Row([*range(30, 47)], ()),
        Row([25, *picture(GRIDS[1]), 26, *picture(GRIDS[2]), 27, 28], GRIDS[1:]),
        Row([40, 41, 42], ()),
    ]


@pytest.fixture(scope="module")
def pixels(rows: list[Row]) -> torch.Tensor:
    patches = sum(t * h * w for row in rows for t, h, w in row.grids)
    return torch.randn(patches, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))


def grids_of(rows: list[Row]) -> list[GridTHW]:
    return [grid for row in rows for grid in row.grids]


def packed_hidden(policy, rows: list[Row], features: torch.Tensor | None) -> torch.Tensor:
    layout = policy.layout([row.tokens for row in rows], [row.grids for row in rows])
    return policy(torch.tensor([token for row in rows for token in row.tokens]), layout, features)


def hf_inputs(row: Row, pixels: torch.Tensor, image_token_id: int) -> dict[str, torch.Tensor]:
    ids = torch.tensor(row.tokens)[None]
    inputs = {"input_ids": ids} | picture_tokens(ids, image_token_id)
    return inputs | ({"pixel_values": pixels, "image_grid_thw": torch.tensor(row.grids)} if row.grids else {})


def hf_logits(hf: transformers.PreTrainedModel, rows: list[Row], pixels: torch.Tensor) -> torch.Tensor:
    """[all tokens, vocabulary], one sequence at a time."""
    per_row = pixels.split([sum(t * h * w for t, h, w in row.grids) for row in rows])
    with torch.no_grad():
        inputs = (hf_inputs(row, pixel, hf.config.image_token_id) for row, pixel in zip(rows, per_row, strict=True))
        return torch.cat([hf(**each).logits[0] for each in inputs])


def test_image_features_equal_hugging_face(policy, hf, rows, pixels):
    with torch.no_grad():
        expected = features_of(hf.model.visual(pixels, grid_thw=torch.tensor(grids_of(rows))))
    features = policy.encode_images(pixels, grids_of(rows))
    assert features.shape == expected.shape == (6 + 30 + 16, 128)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


def test_frames_of_a_clip_attend_apart(policy, hf):
    grid = (2, 8, 12)
    clip = torch.randn(192, 1176, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = features_of(hf.model.visual(clip, grid_thw=torch.tensor([grid])))
    torch.testing.assert_close(policy.encode_images(clip, [grid]), expected, atol=1e-5, rtol=0)


def test_logits_equal_hugging_face(policy, hf, rows, pixels):
    with torch.no_grad():
        logits = policy.logits(packed_hidden(policy, rows, policy.encode_images(pixels, grids_of(rows))))
    torch.testing.assert_close(logits, hf_logits(hf, rows, pixels), atol=1e-5, rtol=0)


def test_shuffled_pictures_are_seen(policy, hf, rows, pixels):
    """The parity above would be worth nothing if the pictures didn't matter."""
    with torch.no_grad():
        features = policy.encode_images(pixels, grids_of(rows)).roll(1, dims=0)
        logits = policy.logits(packed_hidden(policy, rows, features))
    assert (logits - hf_logits(hf, rows, pixels)).abs().max() > 1e-2


def test_packed_equals_one_by_one(policy, rows, pixels):
    with torch.no_grad():
        features = policy.encode_images(pixels, grids_of(rows))
        together = packed_hidden(policy, rows, features)
        per_row = features.split([sum(t * h * w // 4 for t, h, w in row.grids) for row in rows])
        alone = torch.cat([packed_hidden(policy, [row], part if row.grids else None) for row, part in zip(rows, per_row, strict=True)])
    torch.testing.assert_close(together, alone, atol=5e-6, rtol=0)


def test_pictures_encoded_together_equal_one_by_one(policy, rows, pixels):
    grids = grids_of(rows)
    per_picture = pixels.split([t * h * w for t, h, w in grids])
    alone = torch.cat([policy.encode_images(part, [grid]) for part, grid in zip(per_picture, grids, strict=True)])
    torch.testing.assert_close(policy.encode_images(pixels, grids), alone, atol=5e-6, rtol=0)


def test_gradients_of_the_pack_are_the_sum_over_sequences(policy, rows, pixels):
    features = policy.encode_images(pixels, grids_of(rows))
    per_row = features.split([sum(t * h * w // 4 for t, h, w in row.grids) for row in rows])
    packed_hidden(policy, rows, features).square().sum().backward()
    together = collect_gradients(policy)
    for row, part in zip(rows, per_row, strict=True):
        packed_hidden(policy, [row], part if row.grids else None).square().sum().backward()
    alone = collect_gradients(policy)
    assert together.keys() == alone.keys()
    for name, gradient in together.items():
        assert (gradient - alone[name]).norm() <= 1e-5 * alone[name].norm(), name


def collect_gradients(policy) -> dict[str, torch.Tensor]:
    gradients = {name: parameter.grad for name, parameter in policy.named_parameters() if parameter.grad is not None}
    policy.zero_grad(set_to_none=True)
    return gradients


def hf_gradients(hf: transformers.PreTrainedModel, rows: list[Row], pixels: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of sum(logits * weight), by MM name. weight [all tokens, vocabulary]"""
    per_row = pixels.split([sum(t * h * w for t, h, w in row.grids) for row in rows])
    logits = torch.cat([hf(**hf_inputs(row, part, hf.config.image_token_id)).logits[0] for row, part in zip(rows, per_row, strict=True)])
    (logits * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in hf.named_parameters()}
    hf.zero_grad(set_to_none=True)
    return gradients


def test_every_gradient_equals_hugging_face_with_nothing_frozen(one_rank, tiny_vl, hf, rows, pixels):
    policy = load_policy(tiny_vl, freeze_vision=False, freeze_projector=False, recompute="full").train()
    weight = torch.randn(sum(len(row.tokens) for row in rows), 512, generator=torch.Generator().manual_seed(2))
    logits = policy.logits(packed_hidden(policy, rows, policy.encode_images(pixels, grids_of(rows))))
    (logits * weight).sum().backward()
    expected = to_megatron(hf_gradients(hf, rows, pixels, weight), policy.architecture.raw)
    for name, parameter in policy.named_parameters():
        assert (parameter.grad - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def test_frozen_parts_have_no_gradient(one_rank, tiny_vl, rows, pixels):
    policy = load_policy(tiny_vl, freeze_vision=True, freeze_projector=False)
    policy.encode_images(pixels, grids_of(rows)).sum().backward()
    trained = {name for name, parameter in policy.named_parameters() if parameter.grad is not None}
    assert trained == {name for name in policy.weights() if name.startswith("image_encoder.projector.")}


def test_bfloat16_stays_near_float32(one_rank, tiny_vl, policy, rows, pixels):
    half = load_policy(tiny_vl, dtype=torch.bfloat16)
    with torch.no_grad():
        exact, rough = (each.logits(packed_hidden(each, rows, each.encode_images(pixels, grids_of(rows)))) for each in (policy, half))
    assert rough.dtype == torch.bfloat16
    # 8 bits of mantissa through 2 + 3 layers: a few percent of the logits' spread (their standard deviation is about 0.6).
    assert (exact - rough.float()).abs().max() < 0.06
    assert (exact - rough.float()).abs().max() > 1e-5


def test_text_only_tied_model_equals_hugging_face(one_rank, tiny_text):
    policy = load_policy(tiny_text)
    hf = transformers.Qwen2ForCausalLM.from_pretrained(tiny_text).float().eval()
    rows = [Row([*range(20, 20 + length)], ()) for length in (5, 17, 9)]
    with torch.no_grad():
        logits = policy.logits(packed_hidden(policy, rows, None))
        expected = torch.cat([hf(torch.tensor(row.tokens)[None]).logits[0] for row in rows])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert "text_decoder.output_layer.weight" not in policy.weights()


def test_image_features_must_fit_the_image_tokens(policy, rows, pixels):
    features = policy.encode_images(pixels, grids_of(rows))
    with pytest.raises(ValueError, match="52 image tokens in the pack, but 51 image features"):
        packed_hidden(policy, rows, features[:-1])
    with pytest.raises(ValueError, match="pixel_values of grids"):
        policy.encode_images(pixels[:-1], grids_of(rows))


def broken(weights: dict[str, torch.Tensor], change: Callable[[dict[str, torch.Tensor]], object]) -> dict[str, torch.Tensor]:
    copied = dict(weights)
    change(copied)
    return copied


def test_weights_that_do_not_fit_are_named(one_rank, tiny_text):
    policy = load_policy(tiny_text)
    weights = {name: tensor.detach().clone() for name, tensor in policy.weights().items()}
    norm = "text_decoder.decoder.final_layernorm.weight"
    with pytest.raises(ValueError, match=f"missing \\['{norm}'\\]"):
        policy.load_weights(broken(weights, lambda w: w.pop(norm)))
    with pytest.raises(ValueError, match="unexpected \\['extra'\\]"):
        policy.load_weights(broken(weights, lambda w: w.update(extra=w[norm])))
    with pytest.raises(ValueError, match="wants shape \\(128,\\), the weights have \\(127,\\)"):
        policy.load_weights(broken(weights, lambda w: w.update({norm: w[norm][1:]})))


def test_sharded_names_are_the_names_of_the_checkpoint_layout(policy):
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    entries = [entry for entry in policy.sharded_state_dict().values() if not isinstance(entry, ShardedObject)]
    assert {entry.key for entry in entries} == policy.weights().keys()
