"""The megatron side has several ways to name and join the same weights: MindSpeed-MM's, MindSpeed-LLM's, and options of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mindspeed_mm_rl.models.names import Entry, Shape

VisionQkv = Literal["per_head", "concatenated"]
Experts = Literal["local", "grouped", "te_grouped"]

_TEXT_PREFIX = "text_decoder."
_LATENT_DOWN = ("self_attention.linear_q_down_proj.weight", "self_attention.linear_q_proj.weight")
_KV_DOWN = "self_attention.linear_kv_down_proj.weight"
_QKV = "self_attention.linear_qkv"
_FIRST_NORM, _SECOND_NORM = "input_layernorm", "pre_mlp_layernorm"
_DENSE_FC1 = "mlp.linear_fc1"
_PLAIN_QKV = tuple(f"self_attention.{name}_proj" for name in "qkv")
_PLAIN_GATE_UP = ("gate_proj", "up_proj")
_LOCAL_EXPERT = "experts.local_experts.{e}."


@dataclass(frozen=True)
class Dialect:
    """Example: Dialect(prefix=False, experts="grouped") is MindSpeed-LLM's layout with --moe-grouped-gemm."""

    prefix: bool = True
    """Text weights start with text_decoder. (MindSpeed-MM) or with nothing (megatron-core, MindSpeed-LLM)."""
    canonical: bool = False
    """q, k, v and gate, up stand alone, as at Hugging Face (for LoRA)."""
    vision_qkv: VisionQkv = "per_head"
    """per_head: rows grouped per head, as megatron's attention reads them. concatenated: [Q | K | V], and cut as if it were not."""
    experts: Experts = "local"
    """local: experts.local_experts.N.linear_fc1.weight. grouped: experts.weight1 and weight2. te_grouped: experts.linear_fc1.weightN,
    and norms inside the linear layers that follow them (Transformer Engine)."""
    latent_joined: bool = False
    """Multi-head latent attention with one linear_qkv for both down projections (MindSpeed-LLM)."""
    padded_vocabulary: int = 0
    """Rows of the embedding and of the output layer, 0: those of config.json."""


MM = Dialect()


def in_dialect(entries: Sequence[Entry], dialect: Dialect) -> list[Entry]:
    """The same weights with the names, joins and cuts of a dialect."""
    if dialect.canonical and any(entry.expert is not None for entry in entries):
        raise ValueError("enable_canonical_hf_struct is true, but it is for dense models: this one has experts; leave it out")
    spoken = [plain for entry in entries for plain in _vision_qkv(entry, dialect)]
    if dialect.canonical:
        spoken = [plain for entry in spoken for plain in _apart(entry)]
    if dialect.latent_joined:
        spoken = _joined_latent(spoken)
    if dialect.experts == "te_grouped":
        spoken = _with_fused_norms([_te_grouped(entry) for entry in spoken])
    if dialect.padded_vocabulary:
        spoken = [_padded(entry, dialect.padded_vocabulary) for entry in spoken]
    return spoken if dialect.prefix else [_renamed(entry, _TEXT_PREFIX, "") for entry in spoken]


def _vision_qkv(entry: Entry, dialect: Dialect) -> list[Entry]:
    if entry.kind != "vision_qkv" or (dialect.vision_qkv == "per_head" and not dialect.canonical):
        return [entry]
    if dialect.vision_qkv == "concatenated":
        return [replace(entry, kind="copy", groups=1)]
    # One rank has the queries, keys and values of its own heads; cutting [Q | K | V] anywhere else would mix them.
    return [replace(entry, kind="copy", split="row_thirds")]


def _apart(entry: Entry) -> list[Entry]:
    names = {"qkv": _PLAIN_QKV, "gate_up": _PLAIN_GATE_UP}.get(entry.kind)
    if names is None:
        return [entry]
    joined = _QKV if entry.kind == "qkv" else "linear_fc1"
    return [
        replace(
            entry,
            mm=entry.mm.replace(joined, name),
            pattern=entry.pattern.replace(joined, name),
            hf=(hf,),
            hf_shapes=(shape,),
            kind="copy",
            split="rows",
        )
        for name, hf, shape in zip(names, entry.hf, entry.hf_shapes, strict=True)
    ]


def _joined_latent(entries: Sequence[Entry]) -> list[Entry]:
    """One replicated linear_qkv of the query's and the key/value's down projection."""
    keys = {entry.layer: entry for entry in entries if entry.mm.endswith(_KV_DOWN)}
    spoken = []
    for entry in entries:
        if entry.mm.endswith(_LATENT_DOWN) and entry.layer in keys:
            keyed = keys[entry.layer]
            name = f"{_QKV}.weight"
            joined = {"mm": keyed.mm.replace(_KV_DOWN, name), "pattern": keyed.pattern.replace(_KV_DOWN, name), "groups": 1}
            shapes: tuple[Shape, ...] = (*entry.hf_shapes, *keyed.hf_shapes)
            spoken.append(replace(keyed, **joined, hf=(*entry.hf, *keyed.hf), hf_shapes=shapes, kind="gate_up", split="replicated"))
        elif not entry.mm.endswith(_KV_DOWN):
            spoken.append(entry)
    return spoken


def _te_grouped(entry: Entry) -> Entry:
    if entry.expert is None:
        return entry
    head, _, weight = entry.pattern.partition(_LOCAL_EXPERT)
    pattern = f"{head}experts.{weight}{{e}}"
    return replace(entry, pattern=pattern, mm=pattern.format(n=entry.layer, e=entry.expert))


def _with_fused_norms(entries: Sequence[Entry]) -> list[Entry]:
    """Transformer Engine's linear layers own the norm before them; a router has none, so a layer with experts keeps its second norm."""
    dense = {entry.layer for entry in entries if entry.part == "text" and entry.mm.endswith(f".{_DENSE_FC1}.weight")}
    owners = {_FIRST_NORM: _QKV, _SECOND_NORM: _DENSE_FC1}
    spoken = []
    for entry in entries:
        norm = next((norm for norm in owners if entry.part == "text" and entry.pattern.endswith(f".{norm}.weight")), None)
        if norm is None or (norm == _SECOND_NORM and entry.layer not in dense):
            spoken.append(entry)
            continue
        pattern = entry.pattern.removesuffix(f"{norm}.weight") + f"{owners[norm]}.layer_norm_weight"
        spoken.append(replace(entry, pattern=pattern, mm=pattern.format(n=entry.layer)))
    return spoken


def _padded(entry: Entry, rows: int) -> Entry:
    is_vocabulary = entry.place != "layer" and entry.part == "text" and entry.split == "rows"
    return replace(entry, padded_rows=rows) if is_vocabulary else entry


def _renamed(entry: Entry, old: str, new: str) -> Entry:
    return replace(entry, mm=new + entry.mm.removeprefix(old), pattern=new + entry.pattern.removeprefix(old))
