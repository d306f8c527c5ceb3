"""inspect names what is there, verify sees one number that differs, and resplit needs no config.json."""

from __future__ import annotations

import argparse
import io
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file

from checkpoint.convert_cli import main
from tests.checkpoints import make_training_save
from tests.convert.families import same, weights
from tests.convert.layouts import Choice, equal, files, to_hf, to_mm

PARTS = Choice(llm=((1, 1), (1, 1)), vit=((2, 1), (1, 0)), tp=2)
VISION = "visual.blocks.1.attn.qkv.weight"


def test_every_kind_is_described(model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = model("qwen2_5_vl", dtype=torch.bfloat16)
    ranks = to_mm(hf, tmp_path / "ranks", PARTS)
    plain = to_mm(model("qwen3_moe"), tmp_path / "plain", Choice(ep=2, form=(("expert_names", "grouped"), ("style", "mcore"))))
    assert main(["hf_to_mm_dcp", f"--cfg.hf_config.hf_dir={hf}", f"--cfg.mm_dir={tmp_path / 'dcp'}"]) == 0
    expected = {
        hf: ("model.safetensors  visual.merger.ln_q.weight  [32]  bfloat16", "a Hugging Face folder"),
        ranks: (
            "mp_rank_01_000 model1  text_decoder.decoder.layers.0.mlp.linear_fc2.weight  [32, 24]  bfloat16",
            "files of ranks: tp 2, pp 2, vpp 2, ep 1; text layers [[1, 1], [1, 1]], vision layers [[2, 1], [1, 0]]; names of MindSpeed-MM",
        ),
        plain: (
            "mp_rank_00_001  decoder.layers.0.mlp.experts.weight1  [32, 128]  float32",
            "tp 1, pp 1, vpp 1, ep 2; text layers [[4]]; names of megatron-core and MindSpeed-LLM, experts grouped",
        ),
        tmp_path / "dcp": ("text_decoder.output_layer.weight  [64, 32]  bfloat16", "a training save (torch_dist)"),
        hf / "model.safetensors": ("visual.merger.ln_q.weight", "a safetensors file"),
        ranks / "release" / "mp_rank_00_001" / "model_optim_rng.pt": ("model1  text_decoder", "a file of one rank (model0, model1)"),
    }
    for path, (row, kind) in expected.items():
        capsys.readouterr()
        assert main(["inspect", str(path)]) == 0
        said = capsys.readouterr().out
        assert row in said and kind in said, path


def test_verify_sees_one_number(model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = model("qwen2_5_vl")
    changed = shutil.copytree(hf, tmp_path / "changed")
    found = weights(changed)
    found[VISION][5, 7] += 0.5
    save_file(found, changed / "model.safetensors")
    ranks = to_mm(hf, tmp_path / "ranks", PARTS)
    assert main(["verify", str(hf), str(ranks)]) == main(["verify", str(ranks), str(hf)]) == 0
    capsys.readouterr()
    assert main(["verify", str(ranks), str(changed)]) == 1
    said = capsys.readouterr().out
    assert f"{VISION} differs in 1 of 3072 values, by at most 0.5" in said and "1 of 105 weights differ" in said
    alone = to_mm(hf, tmp_path / "alone", PARTS, vit_only=True)
    assert main(["verify", str(hf), str(alone)]) == 1
    assert "lm_head.weight is only in the first" in capsys.readouterr().out


def test_verify_without_any_config(model: Callable[..., Path], tmp_path: Path) -> None:
    hf = model("qwen2")
    one, two, other = (to_mm(hf, tmp_path / str(tp), Choice(tp=tp)) for tp in (1, 2, 4))
    assert main(["verify", str(one), str(two)]) == main(["verify", str(other), str(two)]) == 0
    different = to_mm(model("qwen2", dtype=torch.bfloat16), tmp_path / "different", Choice(tp=2))
    assert main(["verify", str(two), str(different)]) == 1


def test_bits_are_compared(model: Callable[..., Path], tmp_path: Path) -> None:
    """0 and -0 are equal numbers; they are not the same weights."""
    hf = model("qwen2")
    folders = []
    for zero in (0.0, -0.0):
        copy = shutil.copytree(hf, tmp_path / str(zero))
        found = weights(copy)
        found["model.norm.weight"][3] = zero
        save_file(found, copy / "model.safetensors")
        folders.append(str(copy))
    assert main(["verify", *folders]) == 1


@pytest.mark.parametrize("tied", [False, True])
def test_resplit_as_users_call_it(tied: bool, model: Callable[..., Path], tmp_path: Path) -> None:
    """MindSpeed-MM's resplit has no Hugging Face folder: flat lists for both sides, and nothing else."""
    hf = model("qwen2_5_vl", tied)
    before, after = Choice(llm=((1, 3),), vit=((4, 0),), tp=2), Choice(llm=((1, 2, 1),), vit=((2, 2, 0),), tp=1)
    source = to_mm(hf, tmp_path / "source", before)
    flat = [
        f"--cfg.{side}_parallel_config.{name}={value}"
        for side, choice in (("source", before), ("target", after))
        for name, value in (
            ("llm_pp_layers", list(choice.llm[0])),
            ("vit_pp_layers", list(choice.vit[0])),
            ("tp_size", choice.tp),
        )
    ]
    call = ["Qwen2_5_VLConverter", "resplit", f"--cfg.source_dir={source}", f"--cfg.target_dir={tmp_path / 'target'}", *flat]
    assert main(call) == 0
    assert equal(files(tmp_path / "target"), files(to_mm(hf, tmp_path / "direct", after)))


def test_a_training_save_of_megatron_is_read(model: Callable[..., Path], tmp_path: Path) -> None:
    """Arguments, optimizer, random states and empty extra states lie beside the weights; nothing of them is run."""
    hf = model("qwen3")
    source = to_mm(hf, tmp_path / "mm", Choice(tp=2, form=(("style", "mcore"), ("make_vocab_size_divisible_by", 24))))
    for path in sorted(source.rglob("model_optim_rng.pt")):
        content = torch.load(path, weights_only=True)
        content["model"]["decoder.layers.0.self_attention.linear_qkv._extra_state"] = io.BytesIO(b"scales")
        content["model"]["output_layer._extra_state"] = None
        random_states = {"random": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}
        arguments = argparse.Namespace(tensor_model_parallel_size=2, params_dtype=torch.bfloat16, load=Path("/somewhere"))
        torch.save({**content, "args": arguments, "rng_state": [random_states], "optimizer": {"param_groups": [{"lr": 1e-6}]}}, path)
    assert same(weights(to_hf(source, hf, tmp_path / "hf")), weights(hf))


def test_a_training_save_of_our_own(model: Callable[..., Path], tmp_path: Path) -> None:
    hf = model("qwen2_5_vl")
    whole = torch.load(to_mm(hf, tmp_path / "mm", Choice()) / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=True)
    save = make_training_save(tmp_path / "save", whole["model"])
    assert main(["verify", str(save), str(hf)]) == 0
    assert same(weights(to_hf(save, hf, tmp_path / "hf")), weights(hf))


def test_new_names_on_request(model: Callable[..., Path], tmp_path: Path) -> None:
    hf = model("qwen2_5_vl")
    mm = to_mm(hf, tmp_path / "mm", Choice())
    options = [f"--cfg.mm_dir={mm}", f"--cfg.hf_config.hf_dir={hf}", f"--cfg.save_hf_dir={tmp_path / 'hf'}"]
    assert main(["mm_to_hf", *options, "--cfg.common_model_config.new_transformers_weight_key=true"]) == 0
    names = set(weights(tmp_path / "hf"))
    assert {"model.visual.merger.ln_q.weight", "model.language_model.norm.weight", "lm_head.weight"} <= names
    assert not any(name.startswith(("visual.", "model.layers.")) for name in names)


def test_a_config_file_and_its_printed_form(model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--print_config writes a template that --config reads."""
    options = [f"--cfg.hf_config.hf_dir={model('qwen2')}", f"--cfg.mm_dir={tmp_path / 'mm'}", "--cfg.parallel_config.tp_size=2"]
    with pytest.raises(SystemExit):
        main(["hf_to_mm", *options, "--print_config"])
    template = tmp_path / "convert.yaml"
    template.write_text(capsys.readouterr().out)
    assert main(["hf_to_mm", "--config", str(template)]) == 0
    assert sorted(path.name for path in (tmp_path / "mm" / "release").iterdir()) == ["mp_rank_00", "mp_rank_01"]
