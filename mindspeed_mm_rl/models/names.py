"""The one Hugging Face <-> megatron table: names, shapes and layouts of every weight, as data.

Megatron names are those of MindSpeed-MM (`image_encoder.*`, `text_decoder.*`); Hugging Face names are the classic ones on disk
(`model.layers.*`, `visual.*`, `lm_head.weight`). A new family is a new entry of FAMILIES. Standard library only.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["copy", "qkv", "gate_up", "vision_qkv"]
Split = Literal["replicated", "rows", "columns", "glu_rows"]
Part = Literal["vision", "projector", "text"]
Head = Literal["vocabulary", "value"]
Shape = tuple[int, ...]

PARTS: tuple[Part, ...] = ("vision", "projector", "text")
EMBEDDING = "text_decoder.embedding.word_embeddings.weight"
OUTPUT_LAYER = "text_decoder.output_layer.weight"


@dataclass(frozen=True)
class Entry:
    """One megatron weight and the Hugging Face weights it is made of.

    Example: Entry("text_decoder.decoder.layers.0.mlp.linear_fc1.weight", ("model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.mlp.up_proj.weight"), "gate_up", "glu_rows", "text", ((128, 64), (128, 64)), 1)
    """

    mm: str
    hf: tuple[str, ...]
    kind: Kind
    """copy: the same tensor. qkv: q, k, v rows regrouped per key/value group (its q heads, its k head, its v head).
    vision_qkv: fused [Q | K | V] rows regrouped per head. gate_up: gate rows, then up rows."""
    split: Split
    """How tensor parallelism cuts the megatron weight: rows = dimension 0, columns = dimension 1, glu_rows = dimension 0 of each half."""
    part: Part
    hf_shapes: tuple[Shape, ...]
    groups: int
    """Key/value groups of qkv, heads of vision_qkv, else 1."""

    @property
    def mm_shape(self) -> Shape:
        return (sum(shape[0] for shape in self.hf_shapes), *self.hf_shapes[0][1:])


@dataclass(frozen=True)
class Rule:
    """A line of the table; shapes are names of sizes."""

    mm: str
    hf: tuple[str, ...]
    shapes: tuple[str, ...]
    kind: Kind = "copy"
    split: Split = "replicated"


@dataclass(frozen=True)
class Block:
    """Rules under a common prefix, repeated for every layer when `repeat` names a size ({n} in the prefixes is the layer number)."""

    mm: str
    hf: str
    part: Part
    rules: tuple[Rule, ...]
    repeat: str = ""
    head: Head | None = None
    """Of the kind of model that has these rules; None: every kind."""


def _weight(mm: str, hf: str, shape: str, split: Split = "replicated") -> Rule:
    return Rule(f"{mm}.weight", (f"{hf}.weight",), (shape,), "copy", split)


def _bias(mm: str, hf: str, shape: str, split: Split = "replicated") -> Rule:
    return Rule(f"{mm}.bias", (f"{hf}.bias",), (shape,), "copy", split)


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_QKV_WEIGHT = Rule(
    "self_attention.linear_qkv.weight",
    tuple(f"{name}.weight" for name in _QKV),
    ("query_rows hidden", "kv_rows hidden", "kv_rows hidden"),
    "qkv",
    "rows",
)
_QKV_BIAS = Rule(
    "self_attention.linear_qkv.bias", tuple(f"{name}.bias" for name in _QKV), ("query_rows", "kv_rows", "kv_rows"), "qkv", "rows"
)
_QK_NORM = (
    _weight("self_attention.q_layernorm", "self_attn.q_norm", "head_dim"),
    _weight("self_attention.k_layernorm", "self_attn.k_norm", "head_dim"),
)
_DENSE_LAYER = (
    _weight("input_layernorm", "input_layernorm", "hidden"),
    _weight("self_attention.linear_proj", "self_attn.o_proj", "hidden query_rows", "columns"),
    _weight("pre_mlp_layernorm", "post_attention_layernorm", "hidden"),
    Rule("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), ("ffn hidden", "ffn hidden"), "gate_up", "glu_rows"),
    _weight("mlp.linear_fc2", "mlp.down_proj", "hidden ffn", "columns"),
)
_TEXT_ENDS = (
    Block("text_decoder.embedding.", "model.", "text", (_weight("word_embeddings", "embed_tokens", "vocab hidden", "rows"),)),
    Block("text_decoder.decoder.", "model.", "text", (_weight("final_layernorm", "norm", "hidden"),)),
    Block("text_decoder.", "", "text", (_weight("output_layer", "lm_head", "vocab hidden", "rows"),), head="vocabulary"),
    Block("text_decoder.", "", "text", (_weight("output_layer", "score", "scores hidden"),), head="value"),
)


def _decoder(*layer: Rule) -> tuple[Block, ...]:
    return (*_TEXT_ENDS, Block("text_decoder.decoder.layers.{n}.", "model.layers.{n}.", "text", layer, repeat="layers"))


_VISION_LAYER = (
    _weight("input_layernorm", "norm1", "vision_hidden"),
    Rule("self_attention.linear_qkv.weight", ("attn.qkv.weight",), ("vision_qkv_rows vision_hidden",), "vision_qkv", "rows"),
    Rule("self_attention.linear_qkv.bias", ("attn.qkv.bias",), ("vision_qkv_rows",), "vision_qkv", "rows"),
    _weight("self_attention.linear_proj", "attn.proj", "vision_hidden vision_hidden", "columns"),
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
    ),
)
_QWEN2_DECODER = _decoder(_QKV_WEIGHT, _QKV_BIAS, *_DENSE_LAYER)

FAMILIES: dict[str, tuple[Block, ...]] = {
    "llama": _decoder(_QKV_WEIGHT, *_DENSE_LAYER),
    "qwen2": _QWEN2_DECODER,
    "qwen2_5_vl": (*_QWEN2_5_VISION, *_QWEN2_DECODER),
    "qwen3": _decoder(_QKV_WEIGHT, *_QK_NORM, *_DENSE_LAYER),
}
"""model_type of config.json -> its blocks."""

_SCORING = "ForSequenceClassification"
_IGNORED_ENDS = (".rotary_emb.inv_freq", "._extra_state")
_RENAMED_PREFIXES = (("model.language_model.", "model."), ("model.visual.", "visual."))


def canonical_hf_name(name: str) -> str:
    """The classic on-disk name of a weight that transformers 5 calls `model.language_model.*` or `model.visual.*` in memory."""
    for new, classic in _RENAMED_PREFIXES:
        if name.startswith(new):
            return classic + name.removeprefix(new)
    return name


def is_buffer(name: str) -> bool:
    """True for what old checkpoints carry beside weights: rotary frequencies, megatron's empty extra state."""
    return name.endswith(_IGNORED_ENDS)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output layer is the embedding; checkpoints before transformers 5 may say so inside text_config only."""
    return bool(config.get("tie_word_embeddings", False) or config.get("text_config", {}).get("tie_word_embeddings", False))


def has_value_head(config: Mapping[str, Any]) -> bool:
    """Whether the model scores a text (a critic, a reward model) instead of naming the next token."""
    return any(str(name).endswith(_SCORING) for name in config.get("architectures") or ())


def with_value_head(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same decoder with one score as its head, as Hugging Face's sequence classification models have it."""
    classes = [re.sub(r"For[A-Z]\w*$", "", str(name)) + _SCORING for name in config.get("architectures") or [""]]
    return {**config, "architectures": classes, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


def sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """The named sizes of the shapes, from a config.json whose text keys are at the top or under text_config.

    Raises ValueError naming a key that config.json lacks.
    """
    text = {**config, **config.get("text_config", {})}
    heads = _size(text, "num_attention_heads")
    head_dim = text.get("head_dim") or _size(text, "hidden_size") // heads
    kv_heads = text.get("num_key_value_heads") or heads
    values = {
        "layers": _size(text, "num_hidden_layers"),
        "hidden": _size(text, "hidden_size"),
        "ffn": _size(text, "intermediate_size"),
        "vocab": _size(text, "vocab_size"),
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "query_rows": heads * head_dim,
        "kv_rows": kv_heads * head_dim,
        "scores": 1,
    }
    if "vision_config" in config:
        values |= _vision_sizes(config["vision_config"])
    return values


def _vision_sizes(vision: Mapping[str, Any]) -> dict[str, int]:
    hidden = _size(vision, "hidden_size")
    return {
        "vision_layers": _size(vision, "depth"),
        "vision_hidden": hidden,
        "vision_heads": _size(vision, "num_heads"),
        "vision_qkv_rows": 3 * hidden,
        "vision_ffn": _size(vision, "intermediate_size"),
        "vision_out": _size(vision, "out_hidden_size"),
        "merged": hidden * vision.get("spatial_merge_size", 2) ** 2,
        "channels": vision.get("in_channels") or vision.get("in_chans") or 3,
        "temporal_patch": vision.get("temporal_patch_size", 2),
        "patch": vision.get("patch_size", 14),
    }


def _size(section: Mapping[str, Any], key: str) -> int:
    if key not in section:
        raise ValueError(f"config.json has no {key}: it does not describe a model that can be converted")
    return int(section[key])


def family(config: Mapping[str, Any]) -> tuple[Block, ...]:
    """The blocks of config's model_type; ValueError naming the nearest known type otherwise."""
    model_type = config.get("model_type", "")
    if model_type not in FAMILIES:
        nearest = difflib.get_close_matches(str(model_type), FAMILIES, n=1, cutoff=0.0)[0]
        known = ", ".join(FAMILIES)
        raise ValueError(f"config.json: unknown model_type {model_type!r}; the nearest known one is {nearest!r} (known: {known})")
    return FAMILIES[model_type]


def entries(config: Mapping[str, Any]) -> list[Entry]:
    """Every weight of the model that config.json (transformers 4 or 5 style) describes, in file order.

    A tied output layer has no entry, the score of a value head has one. Raises ValueError for an unknown model_type or a missing size.
    """
    blocks, known = family(config), sizes(config)
    heads = (None, "value") if has_value_head(config) else (None,) if is_tied(config) else (None, "vocabulary")
    return [
        _entry(block, rule, layer, known)
        for block in blocks
        if block.head in heads
        for layer in range(known[block.repeat] if block.repeat else 1)
        for rule in block.rules
    ]


def _entry(block: Block, rule: Rule, layer: int, known: Mapping[str, int]) -> Entry:
    mm, hf = block.mm.format(n=layer), block.hf.format(n=layer)
    groups = {"qkv": known["kv_heads"], "vision_qkv": known.get("vision_heads", 1)}.get(rule.kind, 1)
    shapes = tuple(tuple(known[size] for size in shape.split()) for shape in rule.shapes)
    return Entry(mm + rule.mm, tuple(hf + name for name in rule.hf), rule.kind, rule.split, block.part, shapes, groups)
