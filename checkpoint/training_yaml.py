"""The layout of a conversion against the YAML of the training that will load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from checkpoint.layouts import shown
from mindspeed_mm_rl.config.model_file import read_model
from mindspeed_mm_rl.models.placement import Layout, Stages

_SIZES = {
    "tensor_model_parallel_size": "tp_size",
    "pipeline_model_parallel_size": "pipeline stages",
    "expert_model_parallel_size": "ep_size",
}


def check_training_yaml(path: Path, layout: Layout, role: str, vision_alone: bool) -> None:
    """role: the section of the model, actor_config or critic_config. Raises ValueError naming the first number that differs, with both."""
    content = _read(path)
    shared, own = (content.get(name) or {} for name in ("megatron_training", "vit_config" if vision_alone else role))
    tensor = layout.tensor_of("vision") if vision_alone else layout.tensor
    converted = dict(zip(_SIZES, (tensor, layout.pipeline, layout.expert), strict=True))
    for key, value in converted.items():
        wanted = own.get(key, shared.get(key, 1))
        if wanted != value:
            section = role if not vision_alone else "vit_config"
            raise ValueError(f"{path}: {section}.{key} is {wanted}, but the conversion has {_SIZES[key]} {value}; make them the same")
    model = read_model(content.get("model"), content.get("defaults"), path.parent, shared.get("model"))
    _check_split(path, "text_decoder", model.get("text_decoder") or {}, layout.text)
    _check_split(path, "vision_encoder", (model.get("image_encoder") or {}).get("vision_encoder") or {}, layout.vision)


def _check_split(path: Path, part: str, section: dict[str, Any], stages: Stages) -> None:
    split = section.get("pipeline_num_layers")
    if split is not None and stages and _flat(split) != [layers for row in stages for layers in row]:
        raise ValueError(f"{path}: {part}.pipeline_num_layers of its model is {split}, but the conversion has {shown(stages)}")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"training_yaml: {path} does not exist")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"training_yaml: {path} is no YAML file ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise ValueError(f"training_yaml: {path} holds no sections")
    return content


def _flat(split: Any) -> list[int]:
    return [number for part in split for number in _flat(part)] if isinstance(split, list) else [int(split)]
