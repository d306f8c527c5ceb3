"""Every kind of bad input ends in one clear sentence, exit status 2 and nothing on disk."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint.convert_cli import main
from tests.convert.families import shard, weights
from tests.convert.layouts import Choice, to_mm
from tests.disks import small_disk

Capture = pytest.CaptureFixture[str]


@dataclass(frozen=True)
class Scene:
    hf: Path
    """A Qwen2.5-VL, the test's own copy."""
    mm: Path
    """The same at tp 2, pp 2."""
    out: Path

    def to_mm(self, *more: str) -> list[str]:
        return ["hf_to_mm", f"--cfg.hf_config.hf_dir={self.hf}", f"--cfg.mm_dir={self.out}", *more]

    def to_hf(self, *more: str) -> list[str]:
        return ["mm_to_hf", f"--cfg.hf_config.hf_dir={self.hf}", f"--cfg.mm_dir={self.mm}", f"--cfg.save_hf_dir={self.out}", *more]

    def rank(self, tensor: int = 0, pipeline: int = 0) -> Path:
        return self.mm / "release" / f"mp_rank_{tensor:02d}_{pipeline:03d}" / "model_optim_rng.pt"

    def change_weights(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        found = weights(self.hf)
        change(found)
        save_file(found, self.hf / "model.safetensors", metadata={"format": "pt"})

    def change_rank(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        content = torch.load(self.rank(), weights_only=True)
        change(content["model"])
        torch.save(content, self.rank())

    def change_config(self, **changes: object) -> None:
        path = self.hf / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def scene(model: Callable[..., Path], tmp_path: Path) -> Scene:
    hf = shutil.copytree(model("qwen2_5_vl"), tmp_path / "hf")
    mm = to_mm(hf, tmp_path / "mm", Choice(llm=((1, 3),), vit=((4, 0),), tp=2))
    return Scene(hf, mm, tmp_path / "out" / "model")


EMBEDDING = "text_decoder.embedding.word_embeddings.weight"
NORM = "model.norm.weight"


def missing_shard(scene: Scene) -> list[str]:
    shard(scene.hf, 3)
    (scene.hf / "model-00002-of-00003.safetensors").unlink()
    return scene.to_mm()


def truncated_safetensors(scene: Scene) -> list[str]:
    os.truncate(scene.hf / "model.safetensors", 20_000)
    return scene.to_mm()


def broken_index(scene: Scene) -> list[str]:
    (scene.hf / "model.safetensors.index.json").write_text("{")
    return scene.to_mm()


def name_twice(scene: Scene) -> list[str]:
    save_file({NORM: torch.ones(32)}, scene.hf / "other.safetensors")
    (scene.hf / "model.safetensors").rename(scene.hf / "some.safetensors")
    return scene.to_mm()


def unknown_key(scene: Scene) -> list[str]:
    scene.change_weights(lambda found: found.update({"model.layers.0.mlp.gait_proj.weight": torch.ones(2)}))
    return scene.to_mm()


def missing_key(scene: Scene) -> list[str]:
    scene.change_weights(lambda found: found.pop(NORM))
    return scene.to_mm()


def wrong_shape(scene: Scene) -> list[str]:
    scene.change_weights(lambda found: found.update({NORM: torch.ones(31)}))
    return scene.to_mm()


def not_a_number(scene: Scene) -> list[str]:
    scene.change_weights(lambda found: found[NORM].fill_(float("nan")))
    return scene.to_mm()


def two_types_in_one(scene: Scene) -> list[str]:
    name = "model.layers.1.mlp.up_proj.weight"
    scene.change_weights(lambda found: found.update({name: found[name].half()}))
    return scene.to_mm()


def scaled_weights(scene: Scene) -> list[str]:
    scene.change_weights(lambda found: found.update({"model.layers.1.mlp.up_proj.weight_scale_inv": torch.ones(1)}))
    return scene.to_mm()


def no_config(scene: Scene) -> list[str]:
    (scene.hf / "config.json").unlink()
    return scene.to_mm()


def config_is_no_json(scene: Scene) -> list[str]:
    (scene.hf / "config.json").write_text("{")
    return scene.to_mm()


def unknown_family(scene: Scene) -> list[str]:
    scene.change_config(model_type="qwen2_5_v1")
    return scene.to_mm()


def nothing_there(scene: Scene) -> list[str]:
    shutil.rmtree(scene.mm)
    scene.mm.mkdir()
    return scene.to_hf()


def missing_rank(scene: Scene) -> list[str]:
    scene.rank(1, 1).unlink()
    return scene.to_hf()


def truncated_rank(scene: Scene) -> list[str]:
    os.truncate(scene.rank(0, 1), 5_000)
    return scene.to_hf()


def code_in_a_rank(scene: Scene) -> list[str]:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(scene.out.parent / "pwned"),)

    torch.save({"model": Evil()}, scene.rank(), pickle_module=pickle)
    return scene.to_hf()


def no_model_in_a_rank(scene: Scene) -> list[str]:
    torch.save({"weights": {}}, scene.rank())
    return scene.to_hf()


def key_missing_in_a_rank(scene: Scene) -> list[str]:
    scene.change_rank(lambda found: found.pop(EMBEDDING))
    return scene.to_hf()


def key_unknown_in_a_rank(scene: Scene) -> list[str]:
    scene.change_rank(lambda found: found.update({"text_decoder.embedding.positions.weight": torch.ones(2)}))
    return scene.to_hf()


def ranks_that_disagree(scene: Scene) -> list[str]:
    scene.change_rank(lambda found: found["text_decoder.decoder.layers.0.input_layernorm.weight"].add_(1))
    return scene.to_hf()


def other_layers_than_the_files(scene: Scene) -> list[str]:
    return scene.to_hf("--cfg.parallel_config.llm_pp_layers=[2,2]")


def other_tensor_size_than_the_files(scene: Scene) -> list[str]:
    return scene.to_hf("--cfg.parallel_config.tp_size=4")


def pointer_to_nowhere(scene: Scene) -> list[str]:
    (scene.mm / "latest_checkpointed_iteration.txt").write_text("30")
    return scene.to_hf()


def existing_output(scene: Scene) -> list[str]:
    scene.out.mkdir(parents=True)
    (scene.out / "thesis.tex").write_text("x")
    return scene.to_mm()


def output_is_a_file(scene: Scene) -> list[str]:
    scene.out.parent.mkdir(parents=True)
    scene.out.write_text("x")
    return scene.to_mm()


def parent_is_a_file(scene: Scene) -> list[str]:
    scene.out.parent.write_text("x")
    return scene.to_mm()


def wrong_direction(scene: Scene) -> list[str]:
    return ["hf_to_mm", f"--cfg.hf_config.hf_dir={scene.mm}", f"--cfg.mm_dir={scene.out}"]


def missing_yaml(scene: Scene) -> list[str]:
    return scene.to_mm("--cfg.training_yaml=/nowhere.yaml")


def other_yaml(scene: Scene) -> list[str]:
    yaml = scene.hf / "training.yaml"
    yaml.write_text("megatron_training: {}\nactor_config: {tensor_model_parallel_size: 4}\n")
    return scene.to_mm(f"--cfg.training_yaml={yaml}", "--cfg.parallel_config.tp_size=2")


def other_yaml_below(scene: Scene) -> list[str]:
    """What a YAML is built upon counts."""
    (scene.hf / "base.yaml").write_text("actor_config: {pipeline_model_parallel_size: 2, num_layer_list: '3,1'}\n")
    yaml = scene.hf / "training.yaml"
    yaml.write_text("defaults: [base]\nactor_config: {lr: 1.0e-6}\n")
    return scene.to_mm(f"--cfg.training_yaml={yaml}", "--cfg.parallel_config.llm_pp_layers=[2,2]")


def other_model_file(scene: Scene) -> list[str]:
    (scene.hf / "model.json").write_text(json.dumps({"text_decoder": {"pipeline_num_layers": [3, 1]}}))
    yaml = scene.hf / "training.yaml"
    yaml.write_text("model: model.json\nactor_config: {pipeline_model_parallel_size: 2}\n")
    return scene.to_mm(f"--cfg.training_yaml={yaml}", "--cfg.parallel_config.llm_pp_layers=[2,2]")


FILES = {
    missing_shard: "names 1 of 3 files that do not exist (model-00002-of-00003.safetensors)",
    truncated_safetensors: "model.safetensors is damaged or cut short",
    broken_index: "model.safetensors.index.json is not a safetensors index",
    name_twice: f"{NORM} is in other.safetensors and in some.safetensors",
    unknown_key: "1 unexpected (model.layers.0.mlp.gait_proj.weight)",
    missing_key: f"1 missing ({NORM})",
    wrong_shape: f"{NORM} has shape [31] but config.json asks for [32]",
    not_a_number: "text_decoder.decoder.final_layernorm.weight holds 32 NaN of 32 values",
    two_types_in_one: "would join weights of several types",
    scaled_weights: "holds 8-bit weights with scales",
    no_config: "config.json does not exist",
    config_is_no_json: "config.json",
    unknown_family: "'qwen2_5_v1'; the nearest known one is 'qwen2_5_vl'",
    nothing_there: "holds no weights that can be read",
    missing_rank: "has 3 of 4 rank files: tensor rank 1, pipeline rank 1 is missing",
    truncated_rank: "mp_rank_00_001/model_optim_rng.pt is damaged",
    code_in_a_rank: "never unpickled (it asks for posix.mkdir)",
    no_model_in_a_rank: "has no `model`",
    key_missing_in_a_rank: f"mp_rank_00_000 lacks {EMBEDDING}",
    key_unknown_in_a_rank: "mp_rank_00_000 has text_decoder.embedding.positions.weight, which no part of the model is called",
    ranks_that_disagree: "model.layers.0.input_layernorm.weight differs between mp_rank_00_000 and mp_rank_01_000",
    other_layers_than_the_files: "llm_pp_layers is [[2, 2]] but the files in",
    other_tensor_size_than_the_files: "tp_size is 4 but the files in",
    pointer_to_nowhere: "says 30 but",
    existing_output: "is not empty",
    output_is_a_file: "exists and is a file",
    parent_is_a_file: "is a file, so that",
    wrong_direction: "config.json does not exist",
    missing_yaml: "/nowhere.yaml does not exist",
    other_yaml: "actor_config.tensor_model_parallel_size is 4, but the conversion has tp_size 2",
    other_yaml_below: "actor_config.num_layer_list is [3, 1], but the conversion has [[2, 2]]",
    other_model_file: "text_decoder.pipeline_num_layers of its model is [3, 1], but the conversion has [[2, 2]]",
}


@pytest.mark.parametrize(("spoil", "message"), FILES.items(), ids=[spoil.__name__ for spoil in FILES])
def test_files(spoil: Callable[[Scene], list[str]], message: str, scene: Scene, capsys: Capture) -> None:
    arguments = spoil(scene)
    before = sorted(scene.hf.parent.rglob("*"))
    capsys.readouterr()
    assert main(arguments) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mm-convert: ")]
    assert len(said) == 1 and message in said[0]
    # The parent folder of the output may have been made, nothing in it.
    assert [path for path in sorted(scene.hf.parent.rglob("*")) if path != scene.out.parent] == [
        path for path in before if path != scene.out.parent
    ]


NUMBERS = {
    ("llm_pp_layers", "[[36]]"): "llm_pp_layers [[36]] sums to 36 layers but the model has 4; pass [[4]]",
    ("llm_pp_layers", "[1,2]"): "sums to 3 layers but the model has 4; pass [[2, 2]]",
    ("llm_pp_layers", "[[1,1],[2]]"): "every virtual stage needs a number for each pipeline rank",
    ("llm_pp_layers", "[5,-1]"): "has a negative number of layers",
    ("vit_pp_layers", "[[3]]"): "vit_pp_layers [[3]] sums to 3 layers but the model has 4",
    ("vit_pp_layers", "[2,2]", "llm_pp_layers", "[4]"): "need a number for each of the same stages",
    ("audio_pp_layers", "[1]"): "audio_pp_layers [[1]] sums to 1 layers but the model has 0",
    (
        "tp_size",
        "3",
    ): "tp_size 3 does not divide the 4 heads of text_decoder.decoder.layers.0.self_attention.linear_qkv.weight; 1, 2, 4 would do",
    ("tp_size", "0"): "tp_size is 0; it must be at least 1",
    ("vit_tp_size", "8"): "vit_tp_size 8 does not divide",
    ("vit_tp_size", "-1"): "vit_tp_size is -1; it must be 0 (as tp_size) or more",
    ("audio_tp_size", "2"): "no model that is offered hears",
    ("ep_size", "2"): "ep_size is 2 but the model has no experts; pass 1",
}


@pytest.mark.parametrize(("given", "message"), NUMBERS.items(), ids=["=".join(given) for given in NUMBERS])
def test_numbers(given: tuple[str, ...], message: str, model: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    options = [f"--cfg.hf_config.hf_dir={model('qwen2_5_vl')}", f"--cfg.mm_dir={tmp_path / 'out'}"]
    numbers = [f"--cfg.parallel_config.{name}={value}" for name, value in zip(given[::2], given[1::2], strict=True)]
    assert main(["hf_to_mm", *options, *numbers]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_experts_that_do_not_divide(model: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    options = ["hf_to_mm", f"--cfg.hf_config.hf_dir={model('qwen3_moe')}", f"--cfg.mm_dir={tmp_path / 'out'}"]
    assert main([*options, "--cfg.parallel_config.ep_size=3"]) == 2
    assert "ep_size 3 does not divide the 8 experts; 1, 2, 4, 8 would do" in capsys.readouterr().err
    assert main([*options, "--cfg.parallel_config.ep_size=4", "--cfg.parallel_config.tp_size=4", "--moe-tp-extend-ep"]) == 2
    assert "ep_size 4 x tp_size 4 (moe_tp_extend_ep) does not divide the 8 experts; 1, 2 would do" in capsys.readouterr().err


def test_a_read_only_disk(model: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    with small_disk(tmp_path / "disk", 1_000_000) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert main(["hf_to_mm", f"--cfg.hf_config.hf_dir={model('qwen2')}", f"--cfg.mm_dir={disk / 'out'}"]) == 2
        assert "Read-only file system" in capsys.readouterr().err
