"""The `model:` file: freezing, pipeline split and recompute, plus architecture numbers that must agree with config.json."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

_PARTS = ("image_encoder", "text_decoder")
_INNER = ("vision_encoder", "vision_projector")
_CHOICES: dict[str, tuple[Any, ...]] = {
    "freeze": (True, False),
    "recompute_granularity": ("full", "selective"),
    "recompute_method": ("uniform", "block"),
}
_SPLIT, _RECOMPUTED = "pipeline_num_layers", "recompute_num_layers"
_OTHER_PARTS = ("text_encoder", "video_encoder")
_TYPO = 0.9
"""Users' model files hold dozens of keys that don't act here: only one that looks like a mistyped acting key is an error."""
_REPOSITORY = Path(__file__).resolve().parents[2]

# Name in a model file -> path in a Hugging Face config.json, per part. Numbers only: names of variants differ between the two worlds.
_TEXT_NUMBERS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "rotary_base": "rope_theta",
    "layernorm_epsilon": "rms_norm_eps",
    "norm_epsilon": "rms_norm_eps",
    "num_experts": "num_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_intermediate_size": "moe_intermediate_size",
    "n_shared_experts": "n_shared_experts",
    "first_k_dense_replace": "first_k_dense_replace",
    "moe_router_num_groups": "n_group",
    "moe_router_group_topk": "topk_group",
    "moe_router_topk_scaling_factor": "routed_scaling_factor",
    "norm_topk_prob": "norm_topk_prob",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "mrope_section": "mrope_section",
    "rope_scaling_factor": "factor",
}
_VISION_NUMBERS = {
    "num_layers": "depth",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_heads",
    "patch_size": "patch_size",
    "spatial_merge_size": "spatial_merge_size",
    "temporal_patch_size": "temporal_patch_size",
    "window_attn_size": "window_size",
    "fullatt_block_indexes": "fullatt_block_indexes",
    "tokens_per_second": "tokens_per_second",
}
_TOP_NUMBERS = {
    "image_token_id": "image_token_id",
    "img_context_token_id": "image_token_id",
    "video_token_id": "video_token_id",
    "vision_start_token_id": "vision_start_token_id",
}


@dataclass(frozen=True)
class ModelChoices:
    """What a model file decides. Example: ModelChoices(freeze_vision=True, freeze_projector=True, recompute="full")."""

    freeze_vision: bool
    freeze_projector: bool
    recompute: Literal["full", "selective"] | None = None
    """recompute_granularity of the text decoder, as the other two are its keys."""
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: int | None = None
    pipeline_num_layers: list[Any] | None = None
    """Of the text decoder: its layers by pipeline rank, or a list of such lists by virtual stage; None leaves them to the sizes."""
    num_layers: int | None = None
    """Of the text decoder; config.json's where there is one."""


def find_file(path: str, folder: Path, key: str) -> Path:
    """`path` as given, else relative to `folder` (of the YAML), to the repository, to the cwd; ValueError names all places."""
    wanted = Path(path).expanduser()
    places = [wanted] if wanted.is_absolute() else [base / wanted for base in (folder, _REPOSITORY, Path.cwd())]
    for place in places:
        if place.is_file():
            return place
    looked = ", ".join(dict.fromkeys(str(place.parent.resolve()) for place in places))
    raise ValueError(f"{key}: {path} doesn't exist (looked in {looked})")


def read_model(model: Any, defaults: Any, folder: Path, name: Any) -> dict[str, Any]:
    """Content of `model: <path>`, of `defaults: - model: <name>` (model/<name>.yaml or .json beside the YAML), or of a section."""
    if isinstance(model, dict):
        return _named(model, name)
    if isinstance(model, str):
        return _named(_read(find_file(model, folder, "model")), name)
    for entry in defaults if isinstance(defaults, list) else []:
        chosen = entry.get("model") if isinstance(entry, dict) else None
        for one in [chosen] if isinstance(chosen, str) else chosen or []:
            return _named(_read(_find_default(one, folder)), name)
    return {}


def _find_default(name: str, folder: Path) -> Path:
    bases = [base / "model" for base in (folder, folder.parent, _REPOSITORY / "examples/rl/configs", _REPOSITORY / "examples/rl")]
    for candidate in (base / f"{name}{ending}" for base in bases for ending in ("", ".yaml", ".json")):
        if candidate.is_file():
            return candidate
    raise ValueError(f"defaults: model: {name}: no {name}.yaml or {name}.json in {', '.join(map(str, bases))}")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text()) if path.suffix == ".json" else OmegaConf.to_container(OmegaConf.load(path))
    except ValueError as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a map, not a {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def _named(content: dict[str, Any], name: Any) -> dict[str, Any]:
    """Model files for text hold {name: {...}}; `megatron_training.model` picks one, the only one needs no picking."""
    inner = content.get(name) if isinstance(name, str) else None
    if inner is None and len(content) == 1 and not set(content) & set(_PARTS):
        inner = next(iter(content.values()))
    named = inner if isinstance(inner, dict) else content
    # Both: a mistyped section that stands alone would pass for a name.
    for keys in (content, named):
        _check_keys(keys, "model")
    return named


def _check_keys(content: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a value that an acting key can't have, and for a key that looks like a mistyped one."""
    acting = (*_PARTS, *_INNER, *_CHOICES, _SPLIT, _RECOMPUTED)
    for key, value in content.items():
        if key in (*_PARTS, *_INNER):
            if not isinstance(value, dict | None):
                raise ValueError(f"{where}.{key} must be a section of key: value lines, not {value!r}")
            _check_keys(value or {}, f"{where}.{key}")
        elif key in _CHOICES:
            if value is not None and value not in _CHOICES[key]:
                raise ValueError(f"{where}.{key}: {value!r} isn't allowed; choose {', '.join(map(str, _CHOICES[key]))}")
        elif key == _RECOMPUTED:
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{where}.{key} must be a number of layers, not {value!r}")
        elif key == _SPLIT:
            if not _is_split(value):
                raise ValueError(f"{where}.{key} must be a list of numbers, not {value!r}")
        elif key not in _OTHER_PARTS and (near := difflib.get_close_matches(key, acting, 1, cutoff=_TYPO)):
            raise ValueError(f"unknown key {where}.{key}; did you mean {near[0]}?")


def _is_split(value: Any) -> bool:
    return all(map(_is_split, value)) if isinstance(value, list) else value is None or isinstance(value, int)


def model_choices(model: Mapping[str, Any], hf: Mapping[str, Any] | None) -> ModelChoices:
    """Vision encoder and projector are frozen unless the model file says otherwise. hf: config.json where there is one."""
    vision, projector = _parts(model)
    decoder = _text_decoder(model)
    return ModelChoices(
        freeze_vision=_frozen(vision),
        freeze_projector=_frozen(projector),
        recompute=decoder.get("recompute_granularity"),
        recompute_method=decoder.get("recompute_method"),
        recompute_num_layers=decoder.get(_RECOMPUTED),
        pipeline_num_layers=_split(decoder),
        num_layers=decoder.get("num_layers") if hf is None else text_config(hf).get("num_hidden_layers"),
    )


def _text_decoder(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """A model file for text alone has its keys at the top."""
    return model.get("text_decoder") or (model if "num_layers" in model else {})


def _split(decoder: Mapping[str, Any]) -> list[Any] | None:
    """None also where all layers are in one stage, as files have it that were written for one pipeline rank."""
    split = decoder.get(_SPLIT)
    return None if isinstance(split, int | list) and len(_flat(split)) <= 1 else split


def _frozen(part: Mapping[str, Any]) -> bool:
    return part.get("freeze") in (None, True)


def _parts(model: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    encoder = model.get("image_encoder") or {}
    return encoder.get("vision_encoder") or {}, encoder.get("vision_projector") or {}


def read_hf_config(folder: str) -> dict[str, Any] | None:
    """config.json of a Hugging Face folder; None when there is none."""
    path = Path(folder) / "config.json"
    return read_json(path) if path.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError that names the file when it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def is_vision_model(hf: Mapping[str, Any] | None, model: Mapping[str, Any]) -> bool:
    return "vision_config" in hf if hf is not None else bool(model.get("image_encoder"))


def text_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The text part with rope settings at its top, for both generations of config.json."""
    text = {"factor": 1.0} | dict(hf.get("text_config") or hf)
    for rope in (text.get("rope_scaling"), text.get("rope_parameters")):
        text |= {key: rope[key] for key in ("mrope_section", "rope_theta", "factor") if rope and key in rope}
    if "kv_lora_rank" in text:
        # Heads of latent attention have three sizes; what is called head_dim is one of them here and another there.
        text.pop("head_dim", None)
    elif text.get("head_dim") is None and text.get("num_attention_heads"):
        text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    if counts := [text[key] for key in ("n_routed_experts", "num_local_experts") if key in text]:
        text["num_experts"] = counts[0]
    return text


def compare_architecture(model: Mapping[str, Any], section_keys: Mapping[str, Any], hf: Mapping[str, Any], hf_path: str) -> None:
    """ValueError for the first number of the model file or the YAML that differs from config.json, with both values."""
    text, vision = text_config(hf), hf.get("vision_config") or {}
    decoder = _text_decoder(model)
    encoder, projector = _parts(model)
    _compare("model: text_decoder", decoder, _text_numbers(text), text, hf_path)
    _compare("megatron_training", section_keys, _text_numbers(text), text, hf_path)
    if vision:
        _compare("model: vision_encoder", encoder, _VISION_NUMBERS, vision, hf_path)
        _compare("model: vision_projector", projector, {"hidden_size": "hidden_size"}, text, hf_path)
        _compare("model", model, _TOP_NUMBERS, hf, hf_path)
    for part, name, layers in ((decoder, "text_decoder", text.get("num_hidden_layers")), (encoder, "vision_encoder", vision.get("depth"))):
        split = part.get("pipeline_num_layers")
        if split is not None and layers is not None and sum(_flat(split)) != layers:
            raise ValueError(f"model: {name}.pipeline_num_layers {split} sums to {sum(_flat(split))}, but {hf_path} has {layers} layers")


def _text_numbers(text: Mapping[str, Any]) -> dict[str, str]:
    """Where every layer has experts, config.json's intermediate_size is nobody's."""
    only_experts = text.get("num_experts") and not text.get("first_k_dense_replace") and not text.get("mlp_only_layers")
    return {name: hf_name for name, hf_name in _TEXT_NUMBERS.items() if not (only_experts and hf_name == "intermediate_size")}


def _flat(split: Any) -> list[int]:
    return [number for part in split for number in _flat(part)] if isinstance(split, list) else [int(split)]


def _compare(where: str, ours: Mapping[str, Any], names: Mapping[str, str], theirs: Mapping[str, Any], hf_path: str) -> None:
    for name, hf_name in names.items():
        mine, right = ours.get(name), theirs.get(hf_name)
        if mine is None or right is None or mine == right:
            continue
        if isinstance(mine, str) or not isinstance(mine, int | float | list):
            raise ValueError(f"{where}.{name} must be a number, not {mine!r}")
        raise ValueError(
            f"{where}.{name} is {mine}, but {hf_name} in {hf_path}/config.json is {right}; config.json decides: write its number, "
            f"or remove {name}"
        )
