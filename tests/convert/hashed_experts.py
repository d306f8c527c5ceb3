"""Tiny checkpoints with experts, whose values follow from the weights' names alone (hashed_checkpoint.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.convert.hashed_checkpoint import Shapes, qwen2_5


def qwen3_moe() -> dict[str, Any]:
    """config.json of a tiny Qwen3-MoE: three layers of four experts."""
    return {
        **qwen2_5(False),
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": 3,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def deepseek_v3() -> dict[str, Any]:
    """config.json of a tiny DeepSeek-V3: a dense layer and two of four experts, with a bottleneck for queries, keys and values."""
    return {
        **qwen2_5(False),
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_hidden_layers": 3,
        "num_key_value_heads": 8,
        "q_lora_rank": 20,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
    }


def expert_shapes(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a published checkpoint of this config.json."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    found: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    attention = _latent_attention if config["model_type"] == "deepseek_v3" else _normed_attention
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        found |= {f"{layer}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        found |= {f"{layer}self_attn.{name}.weight": shape for name, shape in attention(config).items()}
        found |= _mlp(f"{layer}mlp.", config, dense=n < config.get("first_k_dense_replace", 0))
    return found


def _mlp(prefix: str, config: Mapping[str, Any], dense: bool) -> Shapes:
    hidden, ffn = config["hidden_size"], config["moe_intermediate_size"]
    if dense:
        return _glu(prefix, hidden, config["intermediate_size"])
    experts = config.get("num_experts") or config["n_routed_experts"]
    found = {f"{prefix}gate.weight": (experts, hidden)}
    for expert in range(experts):
        found |= _glu(f"{prefix}experts.{expert}.", hidden, ffn)
    if "n_shared_experts" in config:
        found |= {f"{prefix}gate.e_score_correction_bias": (experts,)}
        found |= _glu(f"{prefix}shared_experts.", hidden, ffn * config["n_shared_experts"])
    return found


def _glu(prefix: str, hidden: int, ffn: int) -> Shapes:
    return {
        f"{prefix}gate_proj.weight": (ffn, hidden),
        f"{prefix}up_proj.weight": (ffn, hidden),
        f"{prefix}down_proj.weight": (hidden, ffn),
    }


def _normed_attention(config: Mapping[str, Any]) -> Shapes:
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    found: Shapes = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, queries)}
    return found | {"q_norm": (head,), "k_norm": (head,)}


def _latent_attention(config: Mapping[str, Any]) -> Shapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    query, kv = config["q_lora_rank"], config["kv_lora_rank"]
    plain, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    return {
        "q_a_proj": (query, hidden),
        "q_a_layernorm": (query,),
        "q_b_proj": (heads * (plain + rope), query),
        "kv_a_proj_with_mqa": (kv + rope, hidden),
        "kv_a_layernorm": (kv,),
        "kv_b_proj": (heads * (plain + value), kv),
        "o_proj": (hidden, heads * value),
    }
