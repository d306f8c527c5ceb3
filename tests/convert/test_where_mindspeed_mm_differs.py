"""Where MindSpeed-MM's converter drops or mixes weights (the table in docs/convert.md), ours writes them or refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.convert.converting import digests, digests_of_hf, run
from tests.convert.hashed_checkpoint import hashed, make_checkpoint, qwen2_5, qwen2_5_vl

RANK = "model_optim_rng.pt"


def test_rows_that_tp_does_not_divide_are_refused(tmp_path, capsys):
    source = make_checkpoint(tmp_path / "hf", qwen2_5_vl(False, intermediate_size=42))
    assert run("hf_to_mm", **{"mm_dir": tmp_path / "mm", "hf_config.hf_dir": source, "parallel_config.tp_size": 4}) == 2
    assert "42" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_vocabulary_that_tp_does_not_divide_is_refused_or_padded(tmp_path, capsys):
    source = make_checkpoint(tmp_path / "hf", qwen2_5(False, vocab_size=110))
    options = {"hf_config.hf_dir": source, "parallel_config.tp_size": 4, "format.style": "mcore"}
    assert run("hf_to_mm", **{"mm_dir": tmp_path / "mm"}, **options) == 2
    assert "110" in capsys.readouterr().err
    assert run("hf_to_mm", **{"mm_dir": tmp_path / "mm", "format.make_vocab_size_divisible_by": 1}, **options) == 0
    parts = [model(tmp_path / "mm" / "iter_0000001" / f"mp_rank_{rank:02d}")["output_layer.weight"] for rank in range(4)]
    head = hashed("lm_head.weight", (110, 64), torch.float32)
    assert torch.equal(torch.cat(parts), torch.cat([head, head[-1:], head[-1:]]))


def test_canonical_vision_qkv_gives_each_rank_the_queries_keys_and_values_of_its_heads(tmp_path):
    source = make_checkpoint(tmp_path / "hf", qwen2_5_vl(False))
    options = {"parallel_config.tp_size": 2, "common_model_config.enable_canonical_hf_struct": True}
    assert run("hf_to_mm", **{"mm_dir": tmp_path / "mm", "hf_config.hf_dir": source}, **options) == 0
    q, k, v = hashed("visual.blocks.1.attn.qkv.weight", (96, 32), torch.float32).split(32)
    for rank in range(2):
        own = slice(16 * rank, 16 * (rank + 1))
        written = model(tmp_path / "mm" / "release" / f"mp_rank_{rank:02d}")
        name = "image_encoder.encoder.blocks.layers.1.self_attention.linear_qkv.weight"
        assert torch.equal(written[name], torch.cat([q[own], k[own], v[own]]))


def test_the_vision_encoder_of_a_tied_model_has_no_output_layer_in_any_stage(tmp_path):
    source = make_checkpoint(tmp_path / "hf", qwen2_5_vl(True))
    options = {"parallel_config.llm_pp_layers": [[3, 1]], "parallel_config.vit_pp_layers": [[2, 1]], "save_vit_only": True}
    assert run("hf_to_mm", **{"mm_dir": tmp_path / "mm", "hf_config.hf_dir": source}, **options) == 0
    for rank in ("mp_rank_00_000", "mp_rank_00_001"):
        assert {name.split(".")[0] for name in model(tmp_path / "mm" / "release" / rank)} == {"image_encoder"}


@pytest.mark.parametrize("rewrite", ["names_of_transformers_5", "one_file"])
def test_other_spellings_of_a_checkpoint_lose_nothing(rewrite, tmp_path):
    source = make_checkpoint(tmp_path / "hf", qwen2_5_vl(False))
    weights = {name: tensor for path in sorted(source.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(source / "config.json", other)
    save_file(
        {transformers_5(name) if rewrite.startswith("names") else name: tensor for name, tensor in weights.items()},
        other / "model.safetensors",
    )
    for folder in (source, other):
        assert run("hf_to_mm", **{"mm_dir": tmp_path / f"{folder.name}_mm", "hf_config.hf_dir": folder}) == 0
    assert digests(tmp_path / "other_mm") == digests(tmp_path / "hf_mm")


def test_more_than_ten_virtual_stages_come_back(tmp_path):
    source = make_checkpoint(tmp_path / "hf", qwen2_5(False, num_hidden_layers=13))
    stages = [[2], *[[1]] * 9, [2]]
    options = {"mm_dir": tmp_path / "mm", "hf_config.hf_dir": source}
    assert run("hf_to_mm", **options, **{"parallel_config.llm_pp_layers": stages}) == 0
    assert run("mm_to_hf", **options, **{"save_hf_dir": tmp_path / "back"}) == 0
    assert digests_of_hf(tmp_path / "back") == digests_of_hf(source)


def test_a_vision_encoder_in_every_stage_is_refused(tmp_path, capsys):
    source = make_checkpoint(tmp_path / "hf", qwen2_5_vl(False))
    options = {"parallel_config.llm_pp_layers": [[1, 3]], "parallel_config.vit_pp_layers": [[3]]}
    assert run("hf_to_mm", **{"mm_dir": tmp_path / "mm", "hf_config.hf_dir": source}, **options) == 2
    assert json.dumps([[3, 0]]) in capsys.readouterr().err


def transformers_5(name: str) -> str:
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1)


def model(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / RANK, weights_only=True)["model"]
