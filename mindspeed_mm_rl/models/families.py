"""The architecture of a Hugging Face folder as frozen dataclasses: one shape for the config.json of transformers 4 and 5."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindspeed_mm_rl.config.model_file import read_json
from mindspeed_mm_rl.models.names import is_tied
from mindspeed_mm_rl.models.rope_scaling import RopeScaling, read_rope_scaling


@dataclass(frozen=True)
class Family:
    """What a model_type says and config.json doesn't; its weights are a row of names.FAMILIES."""

    qkv_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each query and key head, before rope."""
    vision: bool = False


FAMILIES = {
    "llama": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen2_5_vl": Family(qkv_bias=True, vision=True),
    "qwen3": Family(qk_norm=True),
}

_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
}
"""Keys that would change the network, with the one value that is offered (and meant where the key is missing)."""


@dataclass(frozen=True)
class TextArchitecture:
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
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

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        """Ids a policy must never sample: a sampled image token would ask for a picture that isn't there."""
        ids = (self.image_token_id, self.video_token_id, self.vision_start_token_id, self.vision_end_token_id)
        return tuple(sorted(token for token in ids if token is not None))


def read_architecture(hf_path: str | Path) -> Architecture:
    """Reads config.json (and generation_config.json for further end tokens) of a Hugging Face folder.

    Raises ValueError when the file is missing or no JSON, for an unknown model_type (naming the nearest), and for a feature that
    isn't offered (sliding windows, rope scaling other than linear, llama3 and yarn, biases of attention or MLP, an activation but silu).
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
    )


def _text(folder: Path, raw: Mapping[str, Any], text: Mapping[str, Any], family: Family) -> TextArchitecture:
    rope = text.get("rope_parameters") or text.get("rope_scaling") or raw.get("rope_scaling") or {}
    _check_offered(folder, {**text, **rope})
    heads = text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    return TextArchitecture(
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        num_layers=text["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        vocab_size=text["vocab_size"],
        rms_norm_eps=text["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta") or text.get("rope_theta", 10000.0)),
        rope_scaling=_rope_scaling(folder, rope, text),
        mrope_section=_mrope_section(folder, rope, head_dim) if family.vision else None,
        tie_word_embeddings=is_tied(raw),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        max_position_embeddings=text["max_position_embeddings"],
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
