"""DeepSeek-V3 against Hugging Face: latent attention, sigmoid router with bias and groups, shared experts, first layers dense."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mindspeed_mm_rl.config.model_file import compare_architecture
from mindspeed_mm_rl.models.families import read_architecture
from mindspeed_mm_rl.models.names import entries
from mindspeed_mm_rl.models.rope_scaling import LinearScaling
from mindspeed_mm_rl.platforms import device
from mindspeed_mm_rl.platforms.packed_sdpa import Segments
from tests import parity
from tests.hf_versions import IS_4
from tests.tiny import make_tiny_text

CONTEXT = 32
SMALL = {"hidden": 48, "intermediate": 96, "heads": 4, "kv_heads": 4, "layers": 3, "weight_std": 0.15}
MODELS = {
    "small queries, stretched rope": {
        "rope": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": CONTEXT, "mscale": 1.0, "mscale_all_dim": 0.7},
        "more": {"max_position_embeddings": 8 * CONTEXT},
    },
    "plain queries, weights as they are": {"more": {"q_lora_rank": None, "norm_topk_prob": False, "first_k_dense_replace": 2}},
    "wide values, one group, no shared experts but one": {
        "more": {"v_head_dim": 48, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 0}
    },
}
LENGTHS = (5, 90, 1, 33)


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if IS_4 and "plain queries" in request.param:
        pytest.skip("transformers 4 always compresses the queries")
    return make_tiny_text(tmp_path_factory.mktemp("latent"), family="deepseek_v3", **MODELS[request.param], **SMALL)


@pytest.fixture(scope="module")
def policy(one_rank, folder: Path):
    return parity.megatron(folder)


@pytest.fixture(scope="module")
def hf(folder: Path):
    return parity.hugging_face(folder)


def test_logits_equal_hugging_face_and_do_not_depend_on_packing(policy, hf):
    parity.check_logits(policy, hf, parity.random_rows(LENGTHS))


def test_another_rope_would_be_seen(policy, monkeypatch):
    architecture, rows = policy.architecture, parity.random_rows(LENGTHS)
    with torch.no_grad():
        before = parity.packed_logits(policy, rows)
        monkeypatch.setattr(policy, "architecture", replace(architecture, text=replace(architecture.text, rope_scaling=LinearScaling(2.0))))
        assert (parity.packed_logits(policy, rows) - before).abs().max() > 0.05


def test_every_gradient_equals_hugging_face(policy, hf):
    parity.check_gradients(policy, hf, parity.random_rows(LENGTHS))


def test_names_and_a_round_trip(policy, folder):
    """The router's bias is no gradient's business, but it is loaded, sent and saved."""
    parity.check_names_and_round_trip(policy, folder)
    biases = [tensor for name, tensor in policy.weights().items() if name.endswith("expert_bias")]
    assert biases and all(bias.abs().max() > 0.01 for bias in biases)


def test_the_bias_stays_float32(one_rank, tmp_path: Path):
    """As at Hugging Face and in vLLM; a rounded bias would send tokens to other experts than it was trained with."""
    make_tiny_text(tmp_path, family="deepseek_v3", **SMALL)
    dtypes = {name.rpartition(".")[2]: tensor.dtype for name, tensor in parity.megatron(tmp_path, dtype=torch.bfloat16).weights().items()}
    assert dtypes == {"weight": torch.bfloat16, "expert_bias": torch.float32}


@pytest.mark.parametrize(("wide", "width"), [(12, 8), (8, 12), (8, 8)])
def test_heads_of_values_may_have_another_size(wide: int, width: int):
    """Against softmax(q k^T / sqrt(d)) v in float64."""
    generator = torch.Generator().manual_seed(3)
    query, key = (torch.randn(7, 2, wide, generator=generator, dtype=torch.float64) for _ in range(2))
    value = torch.randn(7, 2, width, generator=generator, dtype=torch.float64)
    output = device.packed_attention(query, key, value, Segments.of([3, 4], [3, 4], torch.device("cpu")), True, 0.3)
    expected = []
    for part in (slice(0, 3), slice(3, 7)):
        scores = torch.einsum("qhd,khd->hqk", query[part], key[part]) * 0.3
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        expected.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), value[part]))
    torch.testing.assert_close(output, torch.cat(expected))


DEEPSEEK_R1 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def read(folder: Path, config: dict):
    (folder / "config.json").write_text(json.dumps(config))
    return read_architecture(folder)


def test_published_config(tmp_path: Path):
    """The softmax scale is (0.1 ln(40) + 1)^2 / sqrt(192) = 1.368888^2 / 13.856406; both magnitudes of rope cancel."""
    architecture = read(tmp_path, DEEPSEEK_R1)
    text = architecture.text
    assert (text.head_dim, text.latent.qk_head_dim, text.latent.v_head_dim, text.latent.kv_lora_rank) == (64, 192, 128, 512)
    assert text.latent.softmax_scale == pytest.approx(0.1352337)
    assert text.rope_scaling.attention_factor == 1.0
    assert text.experts.layers == frozenset(range(3, 61))
    assert (text.experts.count, text.experts.shared_ffn_size, text.experts.n_group, text.experts.topk_group) == (256, 2048, 8, 4)
    assert architecture.notes == (
        "aux_loss_alpha 0.001 isn't used: policies are trained without a load-balancing loss",
        "num_nextn_predict_layers 1 isn't used: layers that predict further tokens are neither loaded nor trained nor saved",
    )
    assert sum(torch.Size(shape).numel() for entry in entries(DEEPSEEK_R1) for shape in entry.hf_shapes) == 671_026_419_200


def test_numbers_of_a_yaml_are_compared_under_deepseeks_names():
    """kv_channels says nothing here: heads have three sizes."""
    right = {
        "num_layers": 61,
        "num_experts": 256,
        "moe_ffn_hidden_size": 2048,
        "moe_router_num_groups": 8,
        "moe_router_topk_scaling_factor": 2.5,
        "qk_head_dim": 128,
        "qk_pos_emb_head_dim": 64,
        "kv_channels": 128,
    }
    compare_architecture({}, right, DEEPSEEK_R1, "hf")
    with pytest.raises(ValueError, match="megatron_training.qk_head_dim is 192, but qk_nope_head_dim in hf/config.json is 128"):
        compare_architecture({}, right | {"qk_head_dim": 192}, DEEPSEEK_R1, "hf")
    with pytest.raises(ValueError, match="megatron_training.num_experts is 128, but num_experts in hf/config.json is 256"):
        compare_architecture({}, right | {"num_experts": 128}, DEEPSEEK_R1, "hf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is not offered: .* convert the model to bfloat16 first"),
        ({"rope_interleave": False}, "rope_interleave false is not offered; only true is"),
        ({"moe_layer_freq": 2}, "moe_layer_freq 2 is not offered"),
        ({"scoring_func": "softmax"}, 'scoring_func "softmax" is not offered; it must say "sigmoid"'),
        ({"topk_method": None}, 'topk_method null is not offered; it must say "noaux_tc"'),
    ],
)
def test_what_would_be_another_network_is_refused(tmp_path: Path, change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, DEEPSEEK_R1 | change)
