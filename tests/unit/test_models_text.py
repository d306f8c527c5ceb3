"""The text families against Hugging Face: Qwen2, Qwen3, Llama; tied and untied; plain and stretched rope; every norm perturbed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from mindspeed_mm_rl.models import families, names
from mindspeed_mm_rl.models.families import read_architecture
from mindspeed_mm_rl.models.rope import rotary
from mindspeed_mm_rl.models.rope_scaling import LinearScaling
from mindspeed_mm_rl.models.weight_layout import to_hf, to_megatron
from tests.hf_versions import needs_5
from tests.parity import hf_logits, packed_logits
from tests.tiny import make_tiny_text

CONTEXT = 32
"""Tokens that the stretched models were "pretrained" on; LENGTHS go beyond."""
LENGTHS = (5, 90, 1, 33)
LONGER = {"max_position_embeddings": 4 * CONTEXT}
"""transformers 4 takes YaRN's factor from here."""
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT, "rope_theta": 100.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": CONTEXT,
    "rope_theta": 500.0,
}
SMALL = {"hidden": 48, "intermediate": 96, "heads": 3, "kv_heads": 1, "weight_std": 0.15}
MODELS = {
    "qwen2_untied_yarn": {"family": "qwen2", "rope": YARN, "more": LONGER, **SMALL},
    "qwen3_untied": {"family": "qwen3", "head_dim": 32, "hidden": 48, "intermediate": 96, "weight_std": 0.15},
    "qwen3_tied_yarn": {
        "family": "qwen3",
        "head_dim": 32,
        "tied": True,
        "rope": YARN,
        "more": LONGER,
        "hidden": 48,
        "intermediate": 96,
        "weight_std": 0.15,
    },
    "llama_tied": {"family": "llama", "tied": True, "rope": {"rope_theta": 100000.0}, **SMALL},
    "llama_untied_llama3": {"family": "llama", "rope": LLAMA3, **SMALL},
    "llama_tied_linear": {"family": "llama", "tied": True, "rope": {"rope_type": "linear", "factor": 4.0}, **SMALL},
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_text(tmp_path_factory.mktemp(request.param), **MODELS[request.param])


@pytest.fixture(scope="module")
def hf(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()


@pytest.fixture(scope="module")
def policy(one_rank, folder: Path):
    from mindspeed_mm_rl.models.qwen2_5_vl import build_policy

    policy = build_policy(read_architecture(folder))
    policy.load_weights(to_megatron(load_file(folder / "model.safetensors"), policy.architecture.raw))
    return policy


@pytest.fixture(scope="module")
def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(8, 512, (length,), generator=generator) for length in LENGTHS]


def test_logits_equal_hugging_face_and_do_not_depend_on_packing(policy, hf, rows):
    with torch.no_grad():
        together = packed_logits(policy, rows)
        alone = torch.cat([packed_logits(policy, [row]) for row in rows])
        expected = hf_logits(hf, rows)
    assert expected.std() > 0.1
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(together, alone, atol=5e-6, rtol=0)


def test_another_rope_would_be_seen(policy, rows, monkeypatch):
    """The parity above would be worth nothing if tiny weights made attention blind to positions."""
    architecture = policy.architecture
    other = replace(architecture.text, rope_scaling=LinearScaling(2.0))
    with torch.no_grad():
        before = packed_logits(policy, rows)
        monkeypatch.setattr(policy, "architecture", replace(architecture, text=other))
        assert (packed_logits(policy, rows) - before).abs().max() > 0.05


def test_every_gradient_equals_hugging_face(policy, hf, rows):
    weight = torch.randn(sum(LENGTHS), policy.architecture.text.vocab_size, generator=torch.Generator().manual_seed(2))
    policy.zero_grad(set_to_none=True)
    (packed_logits(policy, rows) * weight).sum().backward()
    hf.zero_grad(set_to_none=True)
    (hf_logits(hf, rows) * weight).sum().backward()
    expected = to_megatron({name: parameter.grad for name, parameter in hf.named_parameters()}, policy.architecture.raw)
    assert expected.keys() == policy.weights().keys()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def test_a_round_trip_gives_the_same_file(policy, folder):
    """Through the policy's parameters: what the rollout engine is sent is what Hugging Face wrote, bit by bit, under its names."""
    on_disk = load_file(folder / "model.safetensors")
    sent = dict(to_hf(policy.weights(), policy.architecture.raw))
    assert sent.keys() == on_disk.keys()
    assert all(torch.equal(sent[name], on_disk[name]) for name in on_disk)


def test_each_family_has_a_row_of_names():
    assert families.FAMILIES.keys() <= names.FAMILIES.keys()
    for model_type, family in families.FAMILIES.items():
        rules = {rule.mm for block in names.FAMILIES[model_type] for rule in block.rules}
        parts = {block.part for block in names.FAMILIES[model_type]}
        assert family.qk_norm == ("self_attention.k_layernorm.weight" in rules), model_type
        assert family.vision == ("vision" in parts), model_type
        assert family.latent == ("self_attention.kv_layernorm.weight" in rules), model_type
        assert bool(family.router) == ("mlp.router.weight" in rules), model_type
        assert (family.router == "sigmoid") == ("mlp.router.expert_bias" in rules), model_type


QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}


def read(folder: Path, config: dict) -> families.Architecture:
    (folder / "config.json").write_text(json.dumps(config))
    return read_architecture(folder)


def test_published_configs(tmp_path: Path):
    qwen, smol = read(tmp_path, QWEN3_8B).text, read(tmp_path, SMOLLM2_135M).text
    assert (qwen.head_dim, qwen.qk_norm, qwen.qkv_bias, qwen.tie_word_embeddings, qwen.rope_theta) == (128, True, False, False, 1e6)
    assert (smol.head_dim, smol.qk_norm, smol.qkv_bias, smol.tie_word_embeddings, smol.rope_theta) == (64, False, False, True, 1e5)
    assert (smol.num_heads, smol.num_kv_heads, smol.rope_scaling, smol.mrope_section) == (9, 3, None, None)
    for config, parameters in ((QWEN3_8B, 8_190_735_360), (SMOLLM2_135M, 134_515_008)):
        assert sum(shape.numel() for each in names.entries(config) for shape in map(torch.Size, each.hf_shapes)) == parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias true is not offered; only false is"),
        ({"mlp_bias": True}, "mlp_bias true is not offered"),
        ({"rope_interleaved": True}, "rope_interleaved true is not offered"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types sliding_attention are not offered"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not offered"),
        ({"rope_scaling": {"type": "longrope"}}, "rope type 'longrope' is not offered; default, linear, llama3, yarn are"),
        ({"rope_scaling": {"type": "yarn"}}, "key 'factor' is missing for model_type 'llama'"),
        ({"model_type": "lama"}, "the nearest is 'llama' of deepseek_v3, llama, qwen2, qwen2_5_vl, qwen3, qwen3_moe"),
    ],
)
def test_what_would_be_another_network_is_refused(tmp_path: Path, change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, SMOLLM2_135M | change)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
        pytest.param(
            {"type": "yarn", "factor": 40.0, "beta_fast": 16, "beta_slow": 2, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False},
            marks=needs_5("always truncates"),
        ),
        {"rope_type": "yarn", "factor": 128.0, "attention_factor": 1.5, "original_max_position_embeddings": 64},
        pytest.param(
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0},
            marks=needs_5("has rope_theta outside of rope_scaling"),
        ),
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 2048},
        {"type": "linear", "factor": 2.5},
    ],
    ids=["yarn", "deepseek", "factor", "ramp", "llama3", "linear"],
)
def test_stretched_rope_equals_hugging_face_far_beyond_the_context(tmp_path: Path, rope: dict):
    """Flat keys, as transformers 4 writes them."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    text = read(tmp_path, SMOLLM2_135M | {"head_dim": 32, "rope_scaling": rope}).text
    positions = torch.tensor([0, 1, 63, 2047, 2048, 20_000, 81_919])
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    plain = rotary(positions.expand(3, -1), read(tmp_path, SMOLLM2_135M | {"head_dim": 32}).text)
    for ours, theirs, unscaled in zip(rotary(positions.expand(3, -1), text), expected, plain, strict=True):
        torch.testing.assert_close(ours, theirs[0], atol=1e-6, rtol=0)
        assert (ours - unscaled).abs().max() > 0.1


def test_yarn_by_hand(tmp_path: Path):
    """head_dim 4, theta 10000, context 2048: turns in it are 2048 / 2 pi = 326 and 3.26, so the ramp runs from dimension 0 to 2."""
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    text = read(tmp_path, SMOLLM2_135M | {"head_dim": 4, "rope_theta": 10000.0, "rope_scaling": rope}).text
    cos, _ = rotary(torch.ones(3, 1, dtype=torch.int64), text)
    # Dimension with r turns is 4 ln(2048 / 2 pi r) / (2 ln 10000): 0.504 for r = 32, 1.257 for r = 1; rounded outwards 0 and 2.
    angles = torch.tensor([1.0, 0.5 * 0.01 + 0.5 * 0.01 / 4], dtype=torch.float64)
    assert text.rope_scaling.attention_factor == pytest.approx(1.138629436)
    torch.testing.assert_close(cos[0, :2].double(), angles.cos() * 1.138629436, atol=1e-7, rtol=0)
