"""mm-convert on every text family, and on models with a score for a head: there and back, bit for bit, without naming the family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from checkpoint.convert_cli import main
from mindspeed_mm_rl.models.names import with_value_head
from mindspeed_mm_rl.models.weight_files import read_megatron_weights, recognise
from mindspeed_mm_rl.models.weight_layout import to_megatron
from tests.checkpoints import load, make_training_save
from tests.tiny import make_tiny_text

SMALL = {"hidden": 48, "intermediate": 96, "heads": 3, "kv_heads": 1}
MODELS = {
    "llama_tied": {"family": "llama", "tied": True, **SMALL},
    "llama_untied": {"family": "llama", **SMALL},
    "qwen2_untied": {"family": "qwen2", **SMALL},
    "qwen3_tied": {"family": "qwen3", "tied": True, **SMALL, "heads": 4, "kv_heads": 2, "head_dim": 32},
    "qwen3_untied": {"family": "qwen3", **SMALL, "heads": 4, "kv_heads": 2, "head_dim": 32},
}
OUTPUT_LAYER = "text_decoder.output_layer.weight"


def hf_to_mm(source: Path, target: Path, *more: str) -> int:
    return main(["hf_to_mm", *more, "--cfg.hf_config.hf_dir", str(source), "--cfg.mm_dir", str(target)])


def mm_to_hf(source: Path, hf_dir: Path, target: Path, *more: str) -> int:
    arguments = ["--cfg.mm_dir", str(source), "--cfg.hf_config.hf_dir", str(hf_dir), "--cfg.save_hf_dir", str(target)]
    return main(["mm_to_hf", *more, *arguments])


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_bit_exact(name, dtype, tmp_path):
    source = make_tiny_text(tmp_path / "source", **MODELS[name])
    weights = {key: tensor.to(dtype) for key, tensor in load(source)[0].items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert hf_to_mm(source, tmp_path / "mm") == 0
    assert mm_to_hf(tmp_path / "mm", source, tmp_path / "hf") == 0
    assert same(load(tmp_path / "hf")[0], weights)
    content = torch.load(tmp_path / "mm" / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=True)["model"]
    assert (OUTPUT_LAYER in content) == (not MODELS[name].get("tied", False))
    assert sum(tensor.numel() for tensor in content.values()) == sum(tensor.numel() for tensor in weights.values())


@pytest.fixture(scope="module", params=["llama_tied", "qwen2_untied", "qwen3_tied"])
def reward_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    text = make_tiny_text(folder / "text", **MODELS[request.param])
    torch.manual_seed(3)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(text, num_labels=1).float()
    model.save_pretrained(folder / "reward")
    return folder / "reward"


def scores(folder: Path) -> torch.Tensor:
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        return model(torch.arange(20, 60)[None]).logits


@pytest.mark.parametrize("flag", [[], ["--orm"]])
def test_a_reward_model_there_and_back(reward_model, flag, tmp_path):
    assert hf_to_mm(reward_model, tmp_path / "mm", *flag) == 0
    content = torch.load(recognise(tmp_path / "mm").weights, weights_only=True)["model"]
    weights, config = load(reward_model)
    assert content[OUTPUT_LAYER].shape == (1, SMALL["hidden"]) and torch.equal(content[OUTPUT_LAYER], weights["score.weight"])
    assert same(read_megatron_weights(tmp_path / "mm", config), read_megatron_weights(reward_model, config))
    assert mm_to_hf(tmp_path / "mm", reward_model, tmp_path / "hf", *flag) == 0
    assert same(load(tmp_path / "hf")[0], weights)
    assert torch.equal(scores(tmp_path / "hf"), scores(reward_model))


def test_a_reward_that_is_the_first_logit(tiny_text, tmp_path, capsys):
    """As in Nemotron reward models: a causal language model whose first logit at the last token is the reward."""
    assert hf_to_mm(tiny_text, tmp_path / "tied", "--cfg.orm_head", "first_logit") == 2
    assert "there is no lm_head.weight to take it from" in capsys.readouterr().err
    source = make_tiny_text(tmp_path / "text")
    assert hf_to_mm(source, tmp_path / "score", "--orm") == 2
    assert "as in Nemotron reward models, add orm_head first_logit" in capsys.readouterr().err
    assert hf_to_mm(source, tmp_path / "mm", "--cfg.orm_head", "first_logit") == 0
    assert mm_to_hf(tmp_path / "mm", source, tmp_path / "hf", "--orm") == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(source).float()
    with torch.no_grad():
        first = model(torch.arange(20, 60)[None]).logits[0, -1, 0]
    torch.testing.assert_close(scores(tmp_path / "hf")[0, 0], first, atol=1e-5, rtol=0)


def test_a_critic_comes_out_of_a_training_save(reward_model, tmp_path):
    """hf_dir is the actor's: its config.json names the next token's model."""
    actor = reward_model.parent / "text"
    weights, config = load(reward_model)
    make_training_save(tmp_path / "save", to_megatron(weights, config))
    iteration = tmp_path / "save" / "iter_0000010"
    (iteration / "actor").rename(iteration / "critic")
    make_training_save(tmp_path / "save", to_megatron(*load(actor)))
    assert mm_to_hf(tmp_path / "save", actor, tmp_path / "policy") == 0
    assert mm_to_hf(tmp_path / "save", actor, tmp_path / "critic", "--orm") == 0
    assert same(load(tmp_path / "policy")[0], load(actor)[0])
    assert same(load(tmp_path / "critic")[0], weights)
    assert json.loads((tmp_path / "critic" / "config.json").read_text())["architectures"] == config["architectures"]
    assert torch.equal(scores(tmp_path / "critic"), scores(reward_model))


def test_a_save_without_a_critic_is_refused(tiny_text, tmp_path, capsys):
    save = make_training_save(tmp_path / "save", to_megatron(*load(tiny_text)))
    assert mm_to_hf(save, tiny_text, tmp_path / "critic", "--orm") == 2
    assert "the save is incomplete, or its run had no critic" in capsys.readouterr().err


def test_a_model_without_a_score_is_refused(tiny_text, tiny_vl, tmp_path, capsys):
    assert hf_to_mm(tiny_text, tmp_path / "mm", "--orm") == 2
    assert "1 missing (score.weight)" in capsys.readouterr().err
    assert mm_to_hf(tiny_vl, tiny_vl, tmp_path / "hf", "--orm") == 2
    assert "no sequence classification class for qwen2_5_vl" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_class_of_a_value_head():
    config = {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    assert with_value_head(config)["architectures"] == ["Qwen2_5_VLForSequenceClassification"]
    assert with_value_head(with_value_head(config)) == with_value_head(config)
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
