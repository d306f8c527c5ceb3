"""The layout of a conversion against the YAML of the training that will load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoint.layouts import shown
from mindspeed_mm_rl.config.composition import compose
from mindspeed_mm_rl.config.model_file import model_choices, read_model
from mindspeed_mm_rl.models.placement import Layout, Stages

_SIZES = {
    "tensor_model_parallel_size": "tp_size",
    "pipeline_model_parallel_size": "pipeline stages",
    "expert_model_parallel_size": "ep_size",
}


def check_training_yaml(path: Path, layout: Layout, role: str, vision_alone: bool) -> None:
    """role: the section of the model, actor_config or critic_config. Raises ValueError naming the first number that differs, with both."""
    if not path.is_file():
        raise ValueError(f"training_yaml: {path} does not exist")
    content = compose(path)
    shared, own = (content.get(name) or {} for name in ("megatron_training", "vit_config" if vision_alone else role))
    tensor = layout.tensor_of("vision") if vision_alone else layout.tensor
    converted = dict(zip(_SIZES, (tensor, layout.pipeline, layout.expert), strict=True))
    for key, value in converted.items():
        wanted = own.get(key, shared.get(key, 1))
        if wanted != value:
            section = role if not vision_alone else "vit_config"
            raise ValueError(f"{path}: {section}.{key} is {wanted}, but the conversion has {_SIZES[key]} {value}; make them the same")
    model = read_model(content.get("model"), content.get("defaults"), path.parent, shared.get("model"))
    given = own.get("num_layer_list", shared.get("num_layer_list"))
    if given is not None and not vision_alone:
        _check_split(path, f"{role}.num_layer_list", [int(number) for number in str(given).strip("[]() ").split(",")], layout.text)
    else:
        _check_split(path, "text_decoder.pipeline_num_layers of its model", model_choices(model, None).pipeline_num_layers, layout.text)
    encoder = (model.get("image_encoder") or {}).get("vision_encoder") or {}
    _check_split(path, "vision_encoder.pipeline_num_layers of its model", encoder.get("pipeline_num_layers"), layout.vision)


def _check_split(path: Path, where: str, split: Any, stages: Stages) -> None:
    if split is not None and stages and _filled(_flat(split)) != _filled([layers for row in stages for layers in row]):
        raise ValueError(f"{path}: {where} is {split}, but the conversion has {shown(stages)}")


def _filled(stages: list[int]) -> list[int]:
    """Up to the last stage with a layer."""
    return stages[: max((number + 1 for number, layers in enumerate(stages) if layers), default=0)]


def _flat(split: Any) -> list[int]:
    return [number for part in split for number in _flat(part)] if isinstance(split, list) else [int(split)]
