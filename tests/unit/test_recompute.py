"""What the backward pass computes again instead of keeping it: as often as was asked for, and with the same gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_mm_rl.platforms import device
from tests import parity
from tests.tiny import make_tiny_text

LAYERS, VISION_LAYERS = 4, 3
SIZES = {"hidden": 48, "intermediate": 96, "heads": 4, "layers": LAYERS}
GRIDS = ((1, 4, 6), (1, 12, 10))
AGAIN = {
    "full": ({"recompute": "full"}, LAYERS),
    "full, two at a time": ({"recompute": "full", "recompute_num_layers": 2}, LAYERS),
    "full, a block of three": ({"recompute": "full", "recompute_method": "block", "recompute_num_layers": 3}, 3),
    "selective": ({"recompute": "selective"}, LAYERS),
}


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each run of the attention kernel."""
    calls: list[int] = []
    kernel = device.packed_attention

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return kernel(*arguments)

    monkeypatch.setattr(device, "packed_attention", counted)
    return calls


def gradients(folder: Path, calls: list[int], pictures: bool, **options: Any) -> tuple[dict[str, torch.Tensor], int]:
    """Also how often attention ran, and that the network of a training step is meant."""
    calls.clear()
    policy = parity.megatron(folder, freeze_vision=False, freeze_projector=False, **options).train()
    rows, grids, features = parity.random_rows((5, 17, 9), 200), [[], [], []], None
    if pictures:
        architecture = policy.architecture
        pixels = torch.randn(sum(h * w for _, h, w in GRIDS), architecture.vision.patch_values, generator=torch.Generator().manual_seed(1))
        tokens = [torch.full((h * w // 4,), architecture.image_token_id) for _, h, w in GRIDS]
        rows, grids = [torch.cat([rows[0], *tokens, rows[1]]), rows[2]], [list(GRIDS), []]
        features = policy.encode_images(pixels, GRIDS)
    policy.logits(policy(torch.cat(rows), policy.layout(rows, grids), features)).square().sum().backward()
    found = {name: parameter.grad for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert all(gradient.norm() > 0 for name, gradient in found.items() if "experts." not in name)
    return found, len(calls)


def check(folder: Path, calls: list[int], pictures: bool, options: dict[str, Any], expected_again: int) -> None:
    kept, once = gradients(folder, calls, pictures)
    found, calls_again = gradients(folder, calls, pictures, **options)
    assert calls_again - once == expected_again
    assert kept.keys() == found.keys()
    for name, gradient in kept.items():
        assert torch.equal(gradient, found[name]), name


@pytest.mark.parametrize("name", AGAIN)
@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "deepseek_v3"])
def test_text(one_rank, kernel_calls: list[int], tmp_path: Path, family: str, name: str) -> None:
    folder = make_tiny_text(tmp_path, family=family, kv_heads=4 if family == "deepseek_v3" else 2, **SIZES)
    check(folder, kernel_calls, False, *AGAIN[name])


@pytest.mark.parametrize("name", ["full", "selective"])
def test_pictures_whose_encoder_is_trained(one_rank, kernel_calls: list[int], tiny_vl: Path, name: str) -> None:
    check(tiny_vl, kernel_calls, True, AGAIN[name][0], 2 + VISION_LAYERS)
