"""The digest knows a model whatever folder it lies in, and sees one number that changed."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_mm_rl.models.weight_digest import weight_digest
from mindspeed_mm_rl.models.weight_layout import to_megatron
from tests.checkpoints import load, make_training_save, write_mm


def test_every_kind_of_folder_gives_the_same_digest(tiny_vl: Path, tmp_path: Path) -> None:
    weights, config = load(tiny_vl)
    write_mm(tmp_path / "mm", to_megatron(weights, config))
    save = make_training_save(tmp_path / "save", to_megatron(weights, config))
    assert len({weight_digest(folder, tiny_vl) for folder in (tiny_vl, tmp_path / "mm", save)}) == 1


def test_one_changed_number_changes_it(tiny_vl: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_vl, tmp_path / "copy")
    before = weight_digest(copy, tiny_vl)
    path = copy / "model.safetensors"
    weights = load_file(path)
    name = "visual.patch_embed.proj.weight"
    weights[name].view(-1)[5] *= 1 + 2**-20
    save_file(weights, path)
    changed = weight_digest(copy, tiny_vl)
    weights[name] = weights[name].to(torch.bfloat16)
    save_file(weights, path)
    assert len({before, changed, weight_digest(copy, tiny_vl)}) == 3


def test_the_weights_of_another_model_have_none(tiny_vl: Path, tiny_text: Path) -> None:
    with pytest.raises(ValueError, match="visual"):
        weight_digest(tiny_text, tiny_vl)
