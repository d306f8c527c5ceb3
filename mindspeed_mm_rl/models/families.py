"""The architecture of a Hugging Face folder as frozen dataclasses: one shape for the config.json of transformers 4 and 5."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mindspeed_mm_rl.config.model_file import read_json
from mindspeed_mm_rl.models.names import expert_layers, is_tied, sizes
from mindspeed_mm_rl.models.rope_scaling import RopeScaling, read_rope_scaling, rope_kind, softmax_magnitude

ScoreFunction = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Family:
    """What a model_type says and config.json doesn't; its weights are a row of names.FAMILIES."""

    qkv_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each query and key head, before rope."""
    vision: bool = False
    latent: bool = False
    """Multi-head latent attention."""
    router: ScoreFunction | None = None
    """What turns a router's logits into scores; None: no experts."""
    rope_theta: float = 10000.0
    """Where config.json has none, as transformers has it."""


FAMILIES = {
    "deepseek_v3": Family(latent=True, router="sigmoid"),
    "llama": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen2_5_vl": Family(qkv_bias=True, vision=True, rope_theta=1e6),
    "qwen3": Family(qk_norm=True),
    "qwen3_moe": Family(qk_norm=True, router="softmax"),
}

_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "rope_interleave": True,
    "moe_layer_freq": 1,
}
"""Keys that would change the network, with the one value that is offered (and meant where the key is missing)."""
_SIGMOID_ROUTER = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
"""Keys that must say so: where they are missing, transformers takes these values, the rollout engine softmax without a bias."""
_UNUSED = {
    "router_aux_loss_coef": "policies are trained without a load-balancing loss",
    "aux_loss_alpha": "policies are trained without a load-balancing loss",
    "num_nextn_predict_layers": "layers that predict further tokens are neither loaded nor trained nor saved",
}
"""Keys that ask for something beside the policy itself, unless they are 0."""


@dataclass(frozen=True)
class Experts:
    """A router picks some of many small MLPs for each token; the token gets the weighted sum of their outputs."""

    count: int
    per_token: int
    ffn_size: int
    shared_ffn_size: int
    """Of the experts that every token goes through, as one MLP; 0: there are none."""
    layers: frozenset[int]
    """Layers (from 0) with experts; the others have one MLP of intermediate_size."""
    score_function: ScoreFunction
    """sigmoid: each expert has a bias besides, which has a say in the choice but not in the weights (arXiv:2408.15664)."""
    norm_topk_prob: bool
    """The weights of a token's experts are divided by their sum."""
    routed_scaling_factor: float
    """Then multiplied by this."""
    n_group: int
    """Experts stand in so many groups, a token's are picked out of the topk_group groups whose two best add up to most."""
    topk_group: int


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention: keys and values of all heads are made of one small vector (DeepSeek-V2, arXiv:2405.04434)."""

    q_lora_rank: int
    """Of the small vector that queries are made of; 0: they are projected directly."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    """Numbers of a query and key head that rope turns; those of the key are the same in all heads."""
    v_head_dim: int
    softmax_scale: float

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True)
class TextArchitecture:
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Numbers of a head that rope turns: all of them but in latent attention."""
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    mrope_section: tuple[int, int, int] | None
    """Frequencies turned by time, height and width positions; they sum to head_dim / 2. None: plain rope."""
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    max_position_embeddings: int
    experts: Experts | None = None
    latent: LatentAttention | None = None


@dataclass(frozen=True)
class VisionArchitecture:
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    out_hidden_size: int
    patch_size: int
    temporal_patch_size: int
    in_channels: int
    merge_size: int
    window_size: int
    """Pixels on a side of an attention window."""
    full_attention_layers: tuple[int, ...]
    """Layers (from 0) that attend over the whole frame; the others attend within windows."""
    tokens_per_second: int

    @property
    def patch_values(self) -> int:
        """Numbers in one flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class Architecture:
    """Example: read_architecture("ckpt/hf/Qwen2.5-VL-7B-Instruct").text.num_layers == 28."""

    model_type: str
    text: TextArchitecture
    vision: VisionArchitecture | None
    image_token_id: int | None
    video_token_id: int | None
    vision_start_token_id: int | None
    vision_end_token_id: int | None
    eos_token_ids: tuple[int, ...]
    raw: dict[str, Any] = field(repr=False, compare=False)
    """config.json as it is."""
    notes: tuple[str, ...] = ()
    """One sentence for each key of config.json that asks for something that isn't done."""

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        """Ids a policy must never sample: a sampled image token would ask for a picture that isn't there."""
        ids = (self.image_token_id, self.video_token_id, self.vision_start_token_id, self.vision_end_token_id)
        return tuple(sorted(token for token in ids if token is not None))


def read_architecture(hf_path: str | Path) -> Architecture:
    """Reads config.json (and generation_config.json for further end tokens) of a Hugging Face folder.

    Raises ValueError when the file is missing or no JSON, for an unknown model_type (naming the nearest), and for a feature that
    isn't offered (sliding windows, rope scaling other than linear, llama3 and yarn, biases of attention or MLP, an activation but silu,
    quantized weights, a router of another kind).
    """
    folder = Path(hf_path).expanduser()
    raw = _read_json(folder / "config.json")
    model_type = raw.get("model_type", "")
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(str(model_type), FAMILIES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{folder / 'config.json'}: model_type {model_type!r} is not offered; the nearest is {near!r} of {', '.join(FAMILIES)}"
        )
    try:
        return _architecture(folder, raw, FAMILIES[model_type])
    except KeyError as missing:
        raise ValueError(f"{folder / 'config.json'}: key {missing} is missing for model_type {model_type!r}") from missing


def _architecture(folder: Path, raw: dict[str, Any], family: Family) -> Architecture:
    # transformers 5 nests the text keys of a vision-language model, transformers 4 has them at the top.
    text = raw.get("text_config") or raw
    return Architecture(
        model_type=raw["model_type"],
        text=_text(folder, raw, text, family),
        vision=_vision(raw["vision_config"]) if family.vision else None,
        image_token_id=raw["image_token_id"] if family.vision else None,
        video_token_id=raw["video_token_id"] if family.vision else None,
        vision_start_token_id=raw["vision_start_token_id"] if family.vision else None,
        vision_end_token_id=raw["vision_end_token_id"] if family.vision else None,
        eos_token_ids=_eos_token_ids(folder, raw, text),
        raw=raw,
        notes=tuple(f"{key} {json.dumps(text[key])} isn't used: {reason}" for key, reason in _UNUSED.items() if text.get(key)),
    )


def _text(folder: Path, raw: Mapping[str, Any], text: Mapping[str, Any], family: Family) -> TextArchitecture:
    rope = _rope(folder, text) or raw.get("rope_scaling") or {}
    _check_offered(folder, {**raw, **text, **rope})
    heads = text["num_attention_heads"]
    latent = _latent(text, rope) if family.latent else None
    head_dim = latent.qk_rope_head_dim if latent else text.get("head_dim") or text["hidden_size"] // heads
    return TextArchitecture(
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        num_layers=text["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        vocab_size=text["vocab_size"],
        rms_norm_eps=text["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta") or text.get("rope_theta", family.rope_theta)),
        rope_scaling=_rope_scaling(folder, rope, text),
        mrope_section=_mrope_section(folder, rope, head_dim) if family.vision else None,
        tie_word_embeddings=is_tied(raw),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        max_position_embeddings=text["max_position_embeddings"],
        experts=_experts(folder, text, family.router) if family.router else None,
        latent=latent,
    )


def _rope(folder: Path, text: Mapping[str, Any]) -> Mapping[str, Any]:
    """By the key of transformers 5 or by that of 4. Where both stand, transformers and the rollout engine read the older one alone."""
    new, old = text.get("rope_parameters") or {}, text.get("rope_scaling") or {}
    if new and old and _plain(new, text) != _plain(old, text):
        raise ValueError(
            f"{folder / 'config.json'}: rope_parameters {json.dumps(new)} and rope_scaling {json.dumps(old)} are two answers; put all keys "
            "into rope_parameters, rope_theta too, and remove rope_scaling"
        )
    return new or old


def _plain(rope: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """However it is spelled."""
    kind = {"rope_type": rope_kind(rope), "rope_theta": rope.get("rope_theta") or text.get("rope_theta")}
    return {key: value for key, value in rope.items() if key not in ("type", *kind)} | kind


def _latent(text: Mapping[str, Any], rope: Mapping[str, Any]) -> LatentAttention:
    plain, turned = text["qk_nope_head_dim"], text["qk_rope_head_dim"]
    return LatentAttention(
        q_lora_rank=text["q_lora_rank"] or 0,
        kv_lora_rank=text["kv_lora_rank"],
        qk_nope_head_dim=plain,
        qk_rope_head_dim=turned,
        v_head_dim=text["v_head_dim"],
        softmax_scale=softmax_magnitude(rope) / (plain + turned) ** 0.5,
    )


def _experts(folder: Path, text: Mapping[str, Any], score_function: ScoreFunction) -> Experts:
    is_sigmoid = score_function == "sigmoid"
    for key, only in _SIGMOID_ROUTER.items() if is_sigmoid else ():
        if text.get(key) != only:
            raise ValueError(f"{folder / 'config.json'}: {key} {json.dumps(text.get(key))} is not offered; it must say {json.dumps(only)}")
    known = sizes(text)
    return Experts(
        count=known["experts"],
        per_token=text["num_experts_per_tok"],
        ffn_size=known["expert_ffn"],
        shared_ffn_size=known["shared_ffn"],
        layers=expert_layers(text),
        score_function=score_function,
        norm_topk_prob=text["norm_topk_prob"],
        routed_scaling_factor=float(text["routed_scaling_factor"]) if is_sigmoid else 1.0,
        n_group=text["n_group"] or 1 if is_sigmoid else 1,
        topk_group=text["topk_group"] or 1 if is_sigmoid else 1,
    )


def _rope_scaling(folder: Path, rope: Mapping[str, Any], text: Mapping[str, Any]) -> RopeScaling | None:
    try:
        return read_rope_scaling(rope, text)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def _mrope_section(folder: Path, rope: Mapping[str, Any], head_dim: int) -> tuple[int, int, int]:
    section = tuple(rope["mrope_section"])
    if sum(section) * 2 != head_dim:
        raise ValueError(f"{folder / 'config.json'}: mrope_section {list(section)} must sum to half of the head size ({head_dim})")
    return section


def _check_offered(folder: Path, keys: Mapping[str, Any]) -> None:
    if keys.get("quantization_config"):
        raise ValueError(
            f"{folder / 'config.json'}: quantization_config is not offered: a policy is trained in bfloat16 or float32; convert the model "
            "to bfloat16 first, and leave quantization_config out of its config.json"
        )
    for key, only in _ONLY.items():
        value = keys.get(key)
        if value is not None and value != only:
            raise ValueError(f"{folder / 'config.json'}: {key} {json.dumps(value)} is not offered; only {json.dumps(only)} is")
    other = set(keys.get("layer_types") or ()) - {"full_attention"}
    if other:
        raise ValueError(f"{folder / 'config.json'}: layer_types {', '.join(sorted(other))} are not offered; only full_attention is")


def _vision(vision: Mapping[str, Any]) -> VisionArchitecture:
    if vision.get("hidden_act", "silu") != "silu":
        raise ValueError(f"vision_config.hidden_act {vision['hidden_act']!r} is not offered; silu is")
    return VisionArchitecture(
        hidden_size=vision["hidden_size"],
        intermediate_size=vision["intermediate_size"],
        num_layers=vision["depth"],
        num_heads=vision["num_heads"],
        out_hidden_size=vision["out_hidden_size"],
        patch_size=vision["patch_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        in_channels=vision.get("in_channels") or vision.get("in_chans") or 3,
        merge_size=vision["spatial_merge_size"],
        window_size=vision["window_size"],
        full_attention_layers=tuple(vision["fullatt_block_indexes"]),
        tokens_per_second=vision.get("tokens_per_second", 2),
    )


def _eos_token_ids(folder: Path, raw: Mapping[str, Any], text: Mapping[str, Any]) -> tuple[int, ...]:
    found: set[int] = set()
    generation = folder / "generation_config.json"
    sources = [raw, text, _read_json(generation) if generation.exists() else {}]
    for source in sources:
        ids = source.get("eos_token_id")
        found.update([ids] if isinstance(ids, int) else ids or [])
    return tuple(sorted(found))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a Hugging Face folder that holds config.json")
    return read_json(path)
