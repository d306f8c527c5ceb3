"""The one Hugging Face <-> megatron table, as data: which weights a family has, how they are joined, cut and placed.

Megatron names are those of MindSpeed-MM (`image_encoder.*`, `text_decoder.*`); Hugging Face names are the classic ones on disk
(`model.layers.*`, `visual.*`, `lm_head.weight`). A new family is a new entry of FAMILIES. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["copy", "qkv", "gate_up", "vision_qkv", "grouped_fc1", "grouped_fc2"]
Split = Literal["replicated", "rows", "columns", "glu_rows", "row_thirds"]
Part = Literal["vision", "projector", "text"]
Head = Literal["vocabulary", "value"]
Place = Literal["first", "last", "layer"]


@dataclass(frozen=True)
class Rule:
    """A line of the table; shapes are names of sizes."""

    mm: str
    hf: tuple[str, ...]
    shapes: tuple[str, ...]
    kind: Kind = "copy"
    split: Split = "replicated"
    unit: str = ""
    """The size whose multiples must stay together when the weight is cut: heads. Empty: any row may be the last of a rank."""


@dataclass(frozen=True)
class Block:
    """Rules under a common prefix; {n} in the prefixes is the layer number, {e} the expert's."""

    mm: str
    hf: str
    part: Part
    rules: tuple[Rule, ...]
    place: Place = "layer"
    """The pipeline stage that has them: the first or the last with a layer of this modality, or the layer's own."""
    repeat: str = ""
    """The size that counts the layers."""
    layers: Literal["all", "dense", "moe"] = "all"
    experts: bool = False
    """Repeated for every expert."""
    needs: str = ""
    """A size that must not be zero; with a ! before it, must be zero."""
    head: Head | None = None
    """Of the kind of model that has these rules; None: every kind."""


def _weight(mm: str, hf: str, shape: str, split: Split = "replicated", unit: str = "") -> Rule:
    return Rule(f"{mm}.weight", (f"{hf}.weight",), (shape,), "copy", split, unit)


def _bias(mm: str, hf: str, shape: str, split: Split = "replicated") -> Rule:
    return Rule(f"{mm}.bias", (f"{hf}.bias",), (shape,), "copy", split)


def _glu(mm: str, hf: str, size: str) -> tuple[Rule, Rule]:
    gate_up = (f"{hf}gate_proj.weight", f"{hf}up_proj.weight")
    return (
        Rule(f"{mm}linear_fc1.weight", gate_up, (f"{size} hidden", f"{size} hidden"), "gate_up", "glu_rows"),
        _weight(f"{mm}linear_fc2", f"{hf}down_proj", f"hidden {size}", "columns"),
    )


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_QKV_WEIGHT = Rule(
    "self_attention.linear_qkv.weight",
    tuple(f"{name}.weight" for name in _QKV),
    ("query_rows hidden", "kv_rows hidden", "kv_rows hidden"),
    "qkv",
    "rows",
    "kv_heads",
)
_QKV_BIAS = Rule(
    "self_attention.linear_qkv.bias",
    tuple(f"{name}.bias" for name in _QKV),
    ("query_rows", "kv_rows", "kv_rows"),
    "qkv",
    "rows",
    "kv_heads",
)
_QK_NORM = (
    _weight("self_attention.q_layernorm", "self_attn.q_norm", "head_dim"),
    _weight("self_attention.k_layernorm", "self_attn.k_norm", "head_dim"),
)
_NORMS = (
    _weight("input_layernorm", "input_layernorm", "hidden"),
    _weight("pre_mlp_layernorm", "post_attention_layernorm", "hidden"),
)
_ATTENTION_OUT = _weight("self_attention.linear_proj", "self_attn.o_proj", "hidden query_rows", "columns", "heads")
_TEXT_ENDS = (
    Block("text_decoder.embedding.", "model.", "text", (_weight("word_embeddings", "embed_tokens", "vocab hidden", "rows"),), "first"),
    Block("text_decoder.decoder.", "model.", "text", (_weight("final_layernorm", "norm", "hidden"),), "last"),
    Block("text_decoder.", "", "text", (_weight("output_layer", "lm_head", "vocab hidden", "rows"),), "last", head="vocabulary"),
    Block("text_decoder.", "", "text", (_weight("output_layer", "score", "scores hidden"),), "last", head="value"),
)
_LAYER = ("text_decoder.decoder.layers.{n}.", "model.layers.{n}.", "text")


def _layer(*rules: Rule, layers: Literal["all", "dense", "moe"] = "all", experts: bool = False, needs: str = "") -> Block:
    mm, hf, part = _LAYER
    if experts:
        mm, hf = f"{mm}mlp.experts.local_experts.{{e}}.", f"{hf}mlp.experts.{{e}}."
    return Block(mm, hf, part, rules, repeat="layers", layers=layers, experts=experts, needs=needs)


_DENSE_MLP = _glu("mlp.", "mlp.", "ffn")
_ROUTER = _weight("mlp.router", "mlp.gate", "experts hidden")
_EXPERTS = _layer(*_glu("", "", "expert_ffn"), layers="moe", experts=True)


def _dense_decoder(*attention: Rule) -> tuple[Block, ...]:
    return (*_TEXT_ENDS, _layer(*attention, _ATTENTION_OUT, *_NORMS, *_DENSE_MLP))


_VISION_LAYER = (
    _weight("input_layernorm", "norm1", "vision_hidden"),
    Rule(
        "self_attention.linear_qkv.weight", ("attn.qkv.weight",), ("vision_qkv_rows vision_hidden",), "vision_qkv", "rows", "vision_heads"
    ),
    Rule("self_attention.linear_qkv.bias", ("attn.qkv.bias",), ("vision_qkv_rows",), "vision_qkv", "rows", "vision_heads"),
    _weight("self_attention.linear_proj", "attn.proj", "vision_hidden vision_hidden", "columns", "vision_heads"),
    _bias("self_attention.linear_proj", "attn.proj", "vision_hidden"),
    _weight("pre_mlp_layernorm", "norm2", "vision_hidden"),
    Rule(
        "mlp.linear_fc1.weight",
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        ("vision_ffn vision_hidden", "vision_ffn vision_hidden"),
        "gate_up",
        "glu_rows",
    ),
    Rule("mlp.linear_fc1.bias", ("mlp.gate_proj.bias", "mlp.up_proj.bias"), ("vision_ffn", "vision_ffn"), "gate_up", "glu_rows"),
    _weight("mlp.linear_fc2", "mlp.down_proj", "vision_hidden vision_ffn", "columns"),
    _bias("mlp.linear_fc2", "mlp.down_proj", "vision_hidden"),
)
_QWEN2_5_VISION = (
    Block(
        "image_encoder.encoder.",
        "visual.",
        "vision",
        (_weight("patch_embed.proj", "patch_embed.proj", "vision_hidden channels temporal_patch patch patch"),),
        "first",
    ),
    Block("image_encoder.encoder.blocks.layers.{n}.", "visual.blocks.{n}.", "vision", _VISION_LAYER, repeat="vision_layers"),
    Block(
        "image_encoder.projector.",
        "visual.merger.",
        "projector",
        (
            _weight("layernorm", "ln_q", "vision_hidden"),
            _weight("encoder.linear_fc1", "mlp.0", "merged merged", "rows"),
            _bias("encoder.linear_fc1", "mlp.0", "merged", "rows"),
            _weight("encoder.linear_fc2", "mlp.2", "vision_out merged", "columns"),
            _bias("encoder.linear_fc2", "mlp.2", "vision_out"),
        ),
        "last",
    ),
)
_QWEN2_DECODER = _dense_decoder(_QKV_WEIGHT, _QKV_BIAS)
_QWEN3_MOE = (
    *_TEXT_ENDS,
    _layer(_QKV_WEIGHT, *_QK_NORM, _ATTENTION_OUT, *_NORMS),
    _layer(*_DENSE_MLP, layers="dense"),
    _layer(_ROUTER, layers="moe"),
    _EXPERTS,
)
# Multi-head latent attention. The down projections are small, so every tensor rank has the whole of them, as with Transformer Engine.
_MLA = (
    _weight("self_attention.linear_kv_down_proj", "self_attn.kv_a_proj_with_mqa", "kv_down hidden"),
    _weight("self_attention.kv_layernorm", "self_attn.kv_a_layernorm", "kv_lora"),
    _weight("self_attention.linear_kv_up_proj", "self_attn.kv_b_proj", "mla_kv_rows kv_lora", "rows", "heads"),
    _weight("self_attention.linear_proj", "self_attn.o_proj", "hidden mla_out", "columns", "heads"),
)
_MLA_QUERY = _layer(_weight("self_attention.linear_q_proj", "self_attn.q_proj", "mla_query_rows hidden", "rows", "heads"), needs="!q_lora")
_MLA_LOW_RANK_QUERY = _layer(
    _weight("self_attention.linear_q_down_proj", "self_attn.q_a_proj", "q_lora hidden"),
    _weight("self_attention.q_layernorm", "self_attn.q_a_layernorm", "q_lora"),
    _weight("self_attention.linear_q_up_proj", "self_attn.q_b_proj", "mla_query_rows q_lora", "rows", "heads"),
    needs="q_lora",
)
_DEEPSEEK_V3 = (
    *_TEXT_ENDS,
    _layer(*_NORMS, *_MLA),
    _MLA_QUERY,
    _MLA_LOW_RANK_QUERY,
    _layer(*_DENSE_MLP, layers="dense"),
    _layer(_ROUTER, Rule("mlp.router.expert_bias", ("mlp.gate.e_score_correction_bias",), ("experts",)), layers="moe"),
    _layer(*_glu("mlp.shared_experts.", "mlp.shared_experts.", "shared_ffn"), layers="moe", needs="shared_ffn"),
    _EXPERTS,
)

FAMILIES: dict[str, tuple[Block, ...]] = {
    "deepseek_v3": _DEEPSEEK_V3,
    "llama": _dense_decoder(_QKV_WEIGHT),
    "qwen2": _QWEN2_DECODER,
    "qwen2_5_vl": (*_QWEN2_5_VISION, *_QWEN2_DECODER),
    "qwen3": _dense_decoder(_QKV_WEIGHT, *_QK_NORM),
    "qwen3_moe": _QWEN3_MOE,
}
"""model_type of config.json -> its blocks."""
