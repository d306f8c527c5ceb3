"""Every weight of a model by both of its names, from config.json: the table of name_rules.py applied to one model.

Standard library only.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mindspeed_mm_rl.models.name_rules import FAMILIES, Block, Kind, Part, Place, Rule, Split

Shape = tuple[int, ...]

PARTS: tuple[Part, ...] = ("vision", "projector", "text")
EMBEDDING = "text_decoder.embedding.word_embeddings.weight"
OUTPUT_LAYER = "text_decoder.output_layer.weight"
HF_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Entry:
    """One megatron weight and the Hugging Face weights it is made of.

    Example: Entry("text_decoder.decoder.layers.0.mlp.linear_fc1.weight", ("model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.mlp.up_proj.weight"), "gate_up", "glu_rows", "text", ((128, 64), (128, 64)), 1,
    "text_decoder.decoder.layers.{n}.mlp.linear_fc1.weight", "layer", 0)
    """

    mm: str
    hf: tuple[str, ...]
    kind: Kind
    """copy: the same tensor. qkv: q, k, v rows regrouped per key/value group (its q heads, its k head, its v head).
    vision_qkv: fused [Q | K | V] rows regrouped per head. gate_up: one after the other, gate rows, then up rows.
    grouped_fc1, grouped_fc2: all experts of a rank in one matrix, transposed (hf: gate, up of each expert; down of each expert)."""
    split: Split
    """How tensor parallelism cuts the megatron weight: rows = dimension 0, columns = dimension 1, glu_rows = dimension 0 of each half,
    row_thirds = dimension 0 of each third."""
    part: Part
    hf_shapes: tuple[Shape, ...]
    groups: int
    """Key/value groups of qkv, heads of vision_qkv; of other weights what must not be cut apart along the split, 1 when anything may."""
    pattern: str = ""
    """mm with {n} for the layer number and {e} for the expert's."""
    place: Place = "layer"
    layer: int | None = None
    expert: int | None = None
    padded_rows: int = 0
    """Rows of a vocabulary that is padded at its end; 0: as config.json says."""

    @property
    def mm_shape(self) -> Shape:
        match self.kind:
            case "grouped_fc1":
                return (self.hf_shapes[0][1], sum(shape[0] for shape in self.hf_shapes))
            case "grouped_fc2":
                return (sum(shape[1] for shape in self.hf_shapes), self.hf_shapes[0][0])
        return (sum(shape[0] for shape in self.hf_shapes), *self.hf_shapes[0][1:])

    @property
    def units(self) -> int:
        """How many pieces tensor parallelism may cut the weight into at most, each of the same size; 0: it is never cut."""
        match self.split:
            case "replicated":
                return 0
            case _ if self.groups > 1 or self.kind in ("qkv", "vision_qkv"):
                return self.groups
            case "columns":
                return self.hf_shapes[0][1]
            case "row_thirds":
                return self.hf_shapes[0][0] // 3
        return self.padded_rows or self.hf_shapes[0][0]

    def local_name(self, layer: int | None, expert: int | None = None) -> str:
        """The name in a file whose layers and experts are counted from its own first one."""
        return self.pattern.format(n=layer, e=expert)


_SCORING = "ForSequenceClassification"
_IGNORED_ENDS = (".rotary_emb.inv_freq", "._extra_state")
_RENAMED_PREFIXES = (("model.language_model.", "model."), ("model.visual.", "visual."))


def canonical_hf_name(name: str) -> str:
    """The classic on-disk name of a weight that transformers 5 calls `model.language_model.*` or `model.visual.*` in memory."""
    for new, classic in _RENAMED_PREFIXES:
        if name.startswith(new):
            return classic + name.removeprefix(new)
    return name


def transformers_5_name(name: str, vision: bool) -> str:
    """The inverse for a vision-language model; a text model's names are the same in both."""
    for new, classic in _RENAMED_PREFIXES if vision else ():
        if name.startswith(classic):
            return new + name.removeprefix(classic)
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
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "query_rows": heads * head_dim,
        "kv_rows": kv_heads * head_dim,
        "scores": 1,
        "experts": 0,
    }
    if "moe_intermediate_size" in text:
        values |= _expert_sizes(text)
    if "kv_lora_rank" in text:
        values |= _latent_sizes(text, heads)
    if "vision_config" in config:
        values |= _vision_sizes(config["vision_config"])
    return values


def _expert_sizes(text: Mapping[str, Any]) -> dict[str, int]:
    counts = [int(text[key]) for key in ("n_routed_experts", "num_experts", "num_local_experts") if text.get(key)]
    if not counts:
        raise ValueError("config.json has moe_intermediate_size but neither n_routed_experts nor num_experts")
    width = _size(text, "moe_intermediate_size")
    return {"experts": counts[0], "expert_ffn": width, "shared_ffn": width * int(text.get("n_shared_experts") or 0)}


def _latent_sizes(text: Mapping[str, Any], heads: int) -> dict[str, int]:
    plain, turned, value = (_size(text, key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    return {
        "q_lora": int(text.get("q_lora_rank") or 0),
        "kv_lora": _size(text, "kv_lora_rank"),
        "kv_down": _size(text, "kv_lora_rank") + turned,
        "mla_query_rows": heads * (plain + turned),
        "mla_kv_rows": heads * (plain + value),
        "mla_out": heads * value,
    }


def expert_layers(config: Mapping[str, Any]) -> frozenset[int]:
    """Numbers of the layers that have experts instead of one MLP."""
    text = {**config, **config.get("text_config", {})}
    if "moe_intermediate_size" not in text:
        return frozenset()
    first, step, dense = text.get("first_k_dense_replace", 0), text.get("decoder_sparse_step", 1), set(text.get("mlp_only_layers") or ())
    return frozenset(n for n in range(_size(text, "num_hidden_layers")) if n >= first and (n + 1) % step == 0 and n not in dense)


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
    blocks, known, sparse = family(config), sizes(config), expert_layers(config)
    heads = (None, "value") if has_value_head(config) else (None,) if is_tied(config) else (None, "vocabulary")
    return [
        _entry(block, rule, layer, expert, known)
        for block in blocks
        if block.head in heads and _is_needed(block, known)
        for layer in _layers(block, known, sparse)
        for expert in (range(known["experts"]) if block.experts else (None,))
        for rule in block.rules
    ]


def tied_output(config: Mapping[str, Any]) -> Entry:
    """The output layer of a tied model as a weight of its own: what a pipeline's last stage has when the embedding is in another."""
    known = sizes(config)
    shapes = ((known["vocab"], known["hidden"]),)
    return Entry(OUTPUT_LAYER, (HF_EMBEDDING,), "copy", "rows", "text", shapes, 1, OUTPUT_LAYER, "last")


def _is_needed(block: Block, known: Mapping[str, int]) -> bool:
    return not block.needs or bool(known[block.needs.lstrip("!")]) != block.needs.startswith("!")


def _layers(block: Block, known: Mapping[str, int], sparse: frozenset[int]) -> Iterator[int | None]:
    if not block.repeat:
        yield None
        return
    for layer in range(known[block.repeat]):
        if block.layers == "all" or (block.layers == "moe") == (layer in sparse):
            yield layer


def _entry(block: Block, rule: Rule, layer: int | None, expert: int | None, known: Mapping[str, int]) -> Entry:
    pattern, hf = block.mm + rule.mm, block.hf.format(n=layer, e=expert)
    shapes = tuple(tuple(known[size] for size in shape.split()) for shape in rule.shapes)
    groups = known[rule.unit] if rule.unit else 1
    names = tuple(hf + name for name in rule.hf)
    mm = pattern.format(n=layer, e=expert)
    return Entry(mm, names, rule.kind, rule.split, block.part, shapes, groups, pattern, block.place, layer, expert)
