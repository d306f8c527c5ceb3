"""Positions and rotations against Hugging Face and against numbers worked by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel, Qwen2_5_VLRotaryEmbedding

from mindspeed_mm_rl.models.families import Architecture, read_architecture
from mindspeed_mm_rl.models.rope import mrope_positions, rotary
from mindspeed_mm_rl.platforms import device
from mindspeed_mm_rl.types import GridTHW
from tests.hf_versions import needs_5, picture_tokens


@pytest.fixture(scope="module")
def architecture(tiny_vl: Path) -> Architecture:
    return read_architecture(tiny_vl)


def tokens(architecture: Architecture, *parts: int | GridTHW) -> list[int]:
    """A number is that many text tokens, a grid is a picture between its markers."""
    out: list[int] = []
    for part in parts:
        if isinstance(part, int):
            out += range(20, 20 + part)
        else:
            count = part[0] * part[1] * part[2] // 4
            out += [architecture.vision_start_token_id, *[architecture.image_token_id] * count, architecture.vision_end_token_id]
    return out


def test_positions_by_hand(architecture: Architecture):
    ids = tokens(architecture, 1, (1, 4, 6), 2)
    # Text 0, start marker 1, picture of 2 x 3 merged patches from 2, then text goes on at 2 + max(2, 3) = 5.
    assert mrope_positions(ids, [(1, 4, 6)], architecture).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7],
    ]


@pytest.mark.parametrize(
    "parts",
    [
        (7,),
        (3, (1, 4, 6), 5),
        ((1, 8, 8), 2, (1, 2, 12), (1, 10, 4), 4),
        pytest.param((1, (3, 4, 4), 2), marks=needs_5("no clips as pictures")),
    ],
    ids=["text", "one", "three", "clip"],
)
def test_positions_equal_hugging_face(architecture: Architecture, tiny_vl: Path, parts: tuple):
    grids = [part for part in parts if isinstance(part, tuple)]
    ids = torch.tensor(tokens(architecture, *parts))
    with torch.device("meta"):
        model = Qwen2_5_VLModel(transformers.AutoConfig.from_pretrained(tiny_vl))
    kinds = picture_tokens(ids[None], architecture.image_token_id)
    expected, _ = model.get_rope_index(ids[None], **kinds, image_grid_thw=torch.tensor(grids) if grids else None)
    assert torch.equal(mrope_positions(ids, grids, architecture), expected[:, 0])


def test_pictures_side_by_side_keep_their_own_positions(architecture: Architecture):
    ids = [architecture.image_token_id] * 5
    positions = mrope_positions(ids, [(1, 2, 2), (1, 4, 4)], architecture)
    assert positions.tolist() == [[0, 1, 1, 1, 1], [0, 1, 1, 2, 2], [0, 1, 2, 1, 2]]


def test_image_tokens_that_do_not_fit_are_named(architecture: Architecture):
    ids = tokens(architecture, 1, (1, 4, 6))
    with pytest.raises(ValueError, match=r"6 image tokens in the sequence, but its pictures \[\(1, 4, 4\)\] make \[4\]"):
        mrope_positions(ids, [(1, 4, 4)], architecture)
    with pytest.raises(ValueError, match="must stand side by side"):
        mrope_positions([*ids[:4], 20, *ids[4:]], [(1, 4, 6)], architecture)


def test_text_model_refuses_pictures(tiny_text: Path):
    with pytest.raises(ValueError, match="takes text only"):
        mrope_positions([1, 2, 3], [(1, 4, 4)], read_architecture(tiny_text))


@needs_5("the rotation is part of its attention")
def test_rotation_equals_hugging_face(architecture: Architecture, tiny_vl: Path):
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

    ids = tokens(architecture, 3, (1, 8, 6), 40)
    positions = mrope_positions(ids, [(1, 8, 6)], architecture)
    config = transformers.AutoConfig.from_pretrained(tiny_vl).text_config
    query = torch.randn(len(ids), 4, 32, generator=torch.Generator().manual_seed(0))
    expected_cos, expected_sin = Qwen2_5_VLRotaryEmbedding(config)(query, positions[:, None])
    expected, _ = apply_rotary_pos_emb(query[None], query[None], expected_cos, expected_sin, unsqueeze_dim=2)
    torch.testing.assert_close(device.rope(query, *rotary(positions, architecture.text)), expected[0], atol=1e-6, rtol=0)


def test_rotation_gradient_is_that_of_the_written_out_formula(architecture: Architecture):
    cos, sin = rotary(torch.arange(5).expand(3, 5), architecture.text)
    generator = torch.Generator().manual_seed(1)
    ours = torch.randn(5, 2, 32, generator=generator, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    weight = torch.randn(5, 2, 32, generator=generator)
    (device.rope(ours, cos, sin) * weight).sum().backward()
    first, second = theirs.split(16, dim=-1)
    (weight * (theirs * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None])).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=0)
