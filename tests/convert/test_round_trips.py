"""Hugging Face -> files of ranks -> Hugging Face is bit for bit the same over families, layouts, names, files and types."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies
from safetensors.torch import save_file

from mindspeed_mm_rl.models.names import transformers_5_name
from tests.convert.families import FAMILIES, rename, same, shard, weights
from tests.convert.layouts import CASES, Choice, check_pair, choices, equal, files, to_hf, to_mm

LAW = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], print_blob=True)


@pytest.mark.parametrize(("family", "choice"), CASES.values(), ids=CASES)
def test_there_and_back(family: str, choice: Choice, model: Callable[..., Path], tmp_path: Path) -> None:
    source = model(family, dtype=torch.bfloat16)
    to_mm(source, tmp_path / "mm", choice)
    to_hf(tmp_path / "mm", source, tmp_path / "hf", choice, check=True)
    assert same(weights(tmp_path / "hf"), weights(source))


@LAW
@pytest.mark.parametrize("family", FAMILIES)
@given(data=strategies.data())
def test_random_layouts(family: str, data: strategies.DataObject, model: Callable[..., Path]) -> None:
    """Through one layout and, resplit, through another, which must be as if it had been converted to directly."""
    first, second = data.draw(choices(family)), data.draw(choices(family))
    tied = data.draw(strategies.booleans()) and "deepseek" not in family
    source = model(family, tied, data.draw(strategies.sampled_from([torch.float32, torch.bfloat16])))
    with tempfile.TemporaryDirectory() as folder:
        check_pair(source, Path(folder), first, second)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("new_names", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_names_and_files_are_those_of_the_source(
    parts: int, new_names: bool, tied: bool, model: Callable[..., Path], tmp_path: Path
) -> None:
    source = shutil.copytree(model("qwen2_5_vl", tied), tmp_path / "source")
    if new_names:
        rename(source, lambda name: transformers_5_name(name, vision=True))
    if parts > 1:
        shard(source, parts)
    choice = Choice(llm=((2, 2),), vit=((4, 0),), tp=2)
    to_hf(to_mm(source, tmp_path / "mm", choice), source, tmp_path / "hf", choice)
    assert same(weights(tmp_path / "hf"), weights(source))
    assert any(name.startswith("model.language_model.") for name in weights(tmp_path / "hf")) == new_names
    assert {path.name for path in source.iterdir()} == {path.name for path in (tmp_path / "hf").iterdir()}


def test_fused_experts_are_read(model: Callable[..., Path], tmp_path: Path) -> None:
    """transformers 5 holds all experts of a layer in one tensor, and some folders have them so."""
    source = model("qwen3_moe")
    found = weights(source)
    fused: dict[str, torch.Tensor] = {name: tensor for name, tensor in found.items() if ".experts." not in name}
    for layer in (0, 2, 3):
        prefix = f"model.layers.{layer}.mlp.experts."
        parts = {what: torch.stack([found[f"{prefix}{n}.{what}_proj.weight"] for n in range(8)]) for what in ("gate", "up", "down")}
        fused |= {f"{prefix}gate_up_proj": torch.cat([parts["gate"], parts["up"]], 1), f"{prefix}down_proj": parts["down"]}
    copy = shutil.copytree(source, tmp_path / "fused")
    save_file({name: tensor.contiguous() for name, tensor in fused.items()}, copy / "model.safetensors")
    choice = Choice(ep=2, tp=2)
    assert equal(files(to_mm(copy, tmp_path / "a", choice)), files(to_mm(source, tmp_path / "b", choice)))


def test_the_vision_encoder_alone(model: Callable[..., Path], tmp_path: Path) -> None:
    source = model("qwen2_5_vl")
    choice = Choice(tp=2)
    whole, alone = to_mm(source, tmp_path / "whole", choice), to_mm(source, tmp_path / "alone", choice, vit_only=True)
    for path, content in files(alone).items():
        if path != "pointer":
            of_vision = {name: tensor for name, tensor in files(whole)[path]["model"].items() if name.startswith("image_encoder.")}
            assert of_vision and equal(content["model"], of_vision)
