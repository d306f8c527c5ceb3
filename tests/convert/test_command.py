"""mm-convert as a user calls it: options, layouts on disk, refusals, and nothing left behind after an error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.convert_cli import main
from mindspeed_mm_rl.models.weight_layout import to_megatron
from tests.checkpoints import CONFIG_7B, load, make_training_save

ROOT = Path(__file__).resolve().parents[2]


def hf_to_mm(source: Path, target: Path, *more: str) -> int:
    return main(["hf_to_mm", "--cfg.hf_config.hf_dir", str(source), "--cfg.mm_dir", str(target), *more])


def mm_to_hf(source: Path, hf_dir: Path, target: Path, *more: str) -> int:
    arguments = ["--cfg.mm_dir", str(source), "--cfg.hf_config.hf_dir", str(hf_dir), "--cfg.save_hf_dir", str(target)]
    return main(["mm_to_hf", *arguments, *more])


@pytest.mark.parametrize("fixture", ["tiny_vl", "tiny_text"])
def test_there_and_back_is_bit_exact(fixture, request, tmp_path):
    source = request.getfixturevalue(fixture)
    assert hf_to_mm(source, tmp_path / "mm") == 0
    assert mm_to_hf(tmp_path / "mm", source, tmp_path / "hf") == 0
    weights, _ = load(source)
    back, _ = load(tmp_path / "hf")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in weights.items())
    side_files = {path.name for path in source.iterdir() if path.is_file() and path.suffix != ".safetensors"}
    assert {"config.json", "tokenizer.json"} <= side_files <= {path.name for path in (tmp_path / "hf").iterdir()}


def test_mm_layout_on_disk(tiny_vl, tmp_path):
    assert hf_to_mm(tiny_vl, tmp_path / "new" / "mm", "--cfg.parallel_config.llm_pp_layers", "[[2]]") == 0
    folder = tmp_path / "new" / "mm"
    file = folder / "release" / "mp_rank_00" / "model_optim_rng.pt"
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "release"
    content = torch.load(file, weights_only=True)
    weights, config = load(tiny_vl)
    assert content.keys() == {"model", "checkpoint_version"} and content["checkpoint_version"] == 3.0
    assert content["model"].keys() == to_megatron(weights, config).keys()
    assert file.stat().st_size < 1.1 * sum(tensor.nbytes for tensor in weights.values())
    assert {oct(path.stat().st_mode & 0o777) for path in (folder, file.parent)} == {"0o750"}
    assert oct(file.stat().st_mode & 0o777) == "0o640"
    assert [path.name for path in folder.parent.iterdir()] == ["mm"]


def test_vision_only(tiny_vl, tiny_text, tmp_path, capsys):
    assert hf_to_mm(tiny_vl, tmp_path / "vit", "--cfg.save_vit_only", "true") == 0
    assert "actor_config.load" not in capsys.readouterr().out
    content = torch.load(tmp_path / "vit" / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=True)
    assert {name.split(".")[0] for name in content["model"]} == {"image_encoder"}
    assert hf_to_mm(tiny_text, tmp_path / "text", "--cfg.save_vit_only", "true") == 2
    assert "has no vision encoder" in capsys.readouterr().err


def test_export_of_a_training_save(tiny_vl, tmp_path):
    weights, config = load(tiny_vl)
    trained = {name: tensor + 1 for name, tensor in weights.items()}
    save = make_training_save(tmp_path / "save", to_megatron(trained, config))
    assert mm_to_hf(save, tiny_vl, tmp_path / "hf", "--cfg.parallel_config.llm_pp_layers", "[2]") == 0
    back, _ = load(tmp_path / "hf")
    assert all(torch.equal(back[name], tensor) for name, tensor in trained.items())


def test_several_weight_files_are_read(tiny_text, tmp_path):
    weights, _ = load(tiny_text)
    source = shutil.copytree(tiny_text, tmp_path / "sharded")
    (source / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, source / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert hf_to_mm(source, tmp_path / "mm") == 0
    assert mm_to_hf(tmp_path / "mm", source, tmp_path / "hf") == 0
    # The same files as in the folder that the others are copied from.
    assert {path.name for path in (tmp_path / "hf").glob("*.safetensors")} == parts.keys()
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == weight_map
    back = {name: tensor for file in parts for name, tensor in load_file(tmp_path / "hf" / file).items()}
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())


def test_the_guides_wrong_example_is_told_28(tmp_path, capsys):
    source = tmp_path / "Qwen2.5-VL-7B-Instruct"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIG_7B))
    assert hf_to_mm(source, tmp_path / "mm", "--cfg.parallel_config.llm_pp_layers", "[[36]]") == 2
    message = capsys.readouterr().err
    assert "llm_pp_layers [[36]] sums to 36 layers" in message and "has 28; pass [[28]]" in message
    assert message.count("\n") == 1 and not (tmp_path / "mm").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("parallel_config.llm_pp_layers", "[[1, 2]]", "sums to 3 layers but the model has 2; pass [[1, 1]]"),
        ("parallel_config.vit_pp_layers", "[[4]]", "has 3; pass [[3]]"),
        ("parallel_config.tp_size", "4", "does not divide the 2 heads of"),
        ("parallel_config.ep_size", "4", "ep_size is 4"),
        ("parallel_config.audio_pp_layers", "[[2]]", "has 0"),
    ],
)
def test_layouts_that_are_not_offered_are_refused(tiny_vl, tmp_path, capsys, option, value, message):
    assert hf_to_mm(tiny_vl, tmp_path / "mm", f"--cfg.{option}", value) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_wrong_direction_is_refused(tiny_vl, tmp_path, capsys):
    assert hf_to_mm(tiny_vl, tmp_path / "mm") == 0
    assert mm_to_hf(tiny_vl, tiny_vl, tmp_path / "out") == 2
    assert "but" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_full_folder_is_never_overwritten(tiny_text, tmp_path, capsys):
    (tmp_path / "mm").mkdir()
    (tmp_path / "mm" / "thesis.tex").write_text("x")
    assert hf_to_mm(tiny_text, tmp_path / "mm") == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mm").iterdir()] == ["thesis.tex"]


def test_an_empty_folder_is_taken(tiny_text, tmp_path):
    (tmp_path / "mm").mkdir()
    assert hf_to_mm(tiny_text, tmp_path / "mm") == 0


def test_an_error_half_way_leaves_nothing(tiny_vl, tmp_path, capsys):
    weights, config = load(tiny_vl)
    save = make_training_save(tmp_path / "save", to_megatron(weights, config))
    for file in (save / "iter_0000010" / "actor").glob("*.distcp"):
        os.truncate(file, file.stat().st_size // 3)
    assert mm_to_hf(save, tiny_vl, tmp_path / "hf") == 2
    assert "damaged or incomplete" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["save"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Qwen2VLConverter", "hf_to_mm"], "the nearest one is Qwen2_5_VLConverter"),
        (["Qwen2_5_VLConverter", "lora_hf_to_mm"], "the commands are hf_to_mm, mm_to_hf"),
        (["hf_to_mm", "--cfg.hf_config.hf_dir", "/nowhere", "--cfg.mm_dir", "/nowhere/mm"], "/nowhere/config.json does not exist"),
    ],
)
def test_wrong_calls_end_in_one_sentence(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_unknown_option_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["hf_to_mm", "--cfg.hf_config.hf_dir", "a", "--cfg.mm_dir", "b", "--cfg.tp", "1"])
    assert stop.value.code == 2 and "--cfg.tp" in capsys.readouterr().err


def test_script_and_converter_name_work_from_anywhere(tiny_text, tmp_path):
    script = [sys.executable, str(ROOT / "checkpoint" / "convert_cli.py"), "Qwen2_5_VLConverter", "hf_to_mm"]
    options = ["--cfg.mm_dir", "mm", "--cfg.hf_config.hf_dir", str(tiny_text), "--cfg.trust_remote_code", "true"]
    done = subprocess.run([*script, *options], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mm" / "release" / "mp_rank_00" / "model_optim_rng.pt").is_file()
