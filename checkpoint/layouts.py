"""From the user's numbers to a Layout, every one of them checked against config.json: a split that leaves a remainder is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint.options import CommonModelConfig, FormatOptions, Layers, ParallelConfig
from mindspeed_mm_rl.models.dialects import Dialect, in_dialect
from mindspeed_mm_rl.models.name_rules import Part
from mindspeed_mm_rl.models.names import Entry, entries, is_tied, sizes
from mindspeed_mm_rl.models.placement import Layout, Stages
from mindspeed_mm_rl.models.rank_files import Unseen

_NAMES = {"text": "llm_pp_layers", "vision": "vit_pp_layers"}


def layout_from(
    parallel: ParallelConfig, common: CommonModelConfig, form: FormatOptions, config: Mapping[str, Any], prefix: str = "parallel_config"
) -> Layout:
    """Raises ValueError naming the number that is wrong and those that would do."""
    _check_model_numbers(common, config)
    known = sizes(config)
    stages = {part: _stages(f"{prefix}.{_NAMES[part]}", getattr(parallel, _NAMES[part])) for part in _NAMES}
    _check_layers(f"{prefix}.audio_pp_layers", _stages("", parallel.audio_pp_layers) or ((0,),), 0)
    has_vision = "vision_layers" in known
    text, vision = _both(stages["text"], stages["vision"], known, has_vision, prefix)
    layout = Layout(
        text=text,
        vision=vision,
        tensor=parallel.tp_size,
        vision_tensor=parallel.vit_tp_size if parallel.vit_tp_size != parallel.tp_size else 0,
        expert=parallel.ep_size,
        tensor_extends_expert=bool(form.moe_tp_extend_ep),
        dialect=_dialect(common, form, config, parallel.tp_size),
    )
    _check_sizes(layout, parallel, config, prefix)
    return layout


def unseen_in(form: FormatOptions) -> Unseen:
    return Unseen(form.vit_qkv, form.moe_tp_extend_ep)


def check_found(parallel: ParallelConfig, found: Layout, folder: Path, prefix: str = "parallel_config") -> None:
    """What the user says of a folder against what its files show; raises ValueError with both."""
    for part, name in _NAMES.items():
        given = _stages(f"{prefix}.{name}", getattr(parallel, name))
        there = found.text if part == "text" else found.vision
        if given is not None and there and sum(given, ()) != sum(there, ()):
            raise ValueError(f"{prefix}.{name} is {shown(given)} but the files in {folder} hold {shown(there)}; leave it out")
    given_sizes = {"tp_size": (parallel.tp_size, found.tensor), "ep_size": (parallel.ep_size, found.expert)}
    given_sizes["vit_tp_size"] = (parallel.vit_tp_size, found.tensor_of("vision"))
    for name, (given, there) in given_sizes.items():
        # 1 and 0 are what these have when the user says nothing.
        if given > 1 and given != there:
            raise ValueError(f"{prefix}.{name} is {given} but the files in {folder} are split into {there}; leave it out or pass {there}")


def tensor_sizes(table: Sequence[Entry], part: Part, uncut_experts: bool) -> list[int]:
    """The tensor parallel sizes that leave no remainder in any weight of the part."""
    own = [entry for entry in table if _modality(entry) == part and not (uncut_experts and entry.expert is not None)]
    common = math.gcd(*(entry.units for entry in own if entry.units))
    return [size for size in range(1, common + 1) if common % size == 0]


def _stages(name: str, layers: Layers) -> Stages | None:
    if layers is None or not layers:
        return None
    nested = [list(part) if isinstance(part, list) else [part] for part in layers]
    rows = nested if isinstance(layers[0], list) else [[count for part in nested for count in part]]
    if any(isinstance(part, list) != isinstance(layers[0], list) for part in layers):
        raise ValueError(f"{name} {layers} mixes numbers and lists; write [[14, 14]], one list per virtual stage, or [14, 14]")
    if any(count < 0 for row in rows for count in row):
        raise ValueError(f"{name} {layers} has a negative number of layers")
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"{name} {layers}: every virtual stage needs a number for each pipeline rank, so lists of one length")
    return tuple(tuple(row) for row in rows)


def _both(text: Stages | None, vision: Stages | None, known: Mapping[str, int], has_vision: bool, prefix: str) -> tuple[Stages, Stages]:
    """Stages of both modalities; what is left out lies in the first stage."""
    shape = text or (vision if has_vision else None) or ((0,),)
    text = text or _all_in_first(shape, known["layers"])
    _check_layers(f"{prefix}.llm_pp_layers", text, known["layers"])
    if not has_vision:
        _check_layers(f"{prefix}.vit_pp_layers", vision or ((0,),), 0)
        return text, ()
    vision = vision or _all_in_first(shape, known["vision_layers"])
    _check_layers(f"{prefix}.vit_pp_layers", vision, known["vision_layers"])
    if (len(vision), len(vision[0])) != (len(text), len(text[0])):
        raise ValueError(
            f"{prefix}.vit_pp_layers {shown(vision)} and llm_pp_layers {shown(text)} need a number for each of the same stages; "
            f"write 0 for a stage without vision layers: {shown(_all_in_first(text, known['vision_layers']))}"
        )
    return text, vision


def _all_in_first(shape: Stages, layers: int) -> Stages:
    flat = [layers] + [0] * (len(shape) * len(shape[0]) - 1)
    width = len(shape[0])
    return tuple(tuple(flat[start : start + width]) for start in range(0, len(flat), width))


def _check_layers(name: str, stages: Stages, expected: int) -> None:
    total = sum(sum(row) for row in stages)
    if total == expected:
        return
    fewer = len(stages) * len(stages[0])
    example = shown(_even(expected, len(stages), len(stages[0]))) if expected else "nothing"
    raise ValueError(f"{name} {shown(stages)} sums to {total} layers but the model has {expected}; pass {example} (for {fewer} stages)")


def _even(layers: int, virtual: int, width: int) -> Stages:
    stages = virtual * width
    counts = [layers // stages + (stage < layers % stages) for stage in range(stages)]
    return tuple(tuple(counts[start : start + width]) for start in range(0, stages, width))


def shown(stages: Stages) -> str:
    """As the user writes it: [[14, 14]]."""
    return str([list(row) for row in stages])


def _dialect(common: CommonModelConfig, form: FormatOptions, config: Mapping[str, Any], tensor: int) -> Dialect:
    known = sizes(config)
    if form.style == "mcore" and "vision_layers" in known:
        raise ValueError("format.style is mcore, MindSpeed-LLM's, which has no vision-language models; leave it out")
    unit = form.make_vocab_size_divisible_by * tensor
    padded = math.ceil(known["vocab"] / unit) * unit if unit else 0
    return Dialect(
        prefix=form.style == "mm",
        canonical=common.enable_canonical_hf_struct,
        vision_qkv=form.vit_qkv,
        experts=form.expert_names,
        latent_joined=form.style == "mcore" and "kv_lora" in known,
        padded_vocabulary=padded if padded > known["vocab"] else 0,
    )


def _check_sizes(layout: Layout, parallel: ParallelConfig, config: Mapping[str, Any], prefix: str) -> None:
    known = sizes(config)
    for name in ("tp_size", "ep_size"):
        if getattr(parallel, name) < 1:
            raise ValueError(f"{prefix}.{name} is {getattr(parallel, name)}; it must be at least 1")
    if parallel.vit_tp_size < 0:
        raise ValueError(f"{prefix}.vit_tp_size is {parallel.vit_tp_size}; it must be 0 (as tp_size) or more")
    if parallel.audio_tp_size > 1:
        raise ValueError(f"{prefix}.audio_tp_size is {parallel.audio_tp_size} but no model that is offered hears; leave it out")
    if parallel.vit_tp_size > 1 and not layout.vision:
        raise ValueError(f"{prefix}.vit_tp_size is {parallel.vit_tp_size} but the model has no vision encoder; leave it out")
    small, large = sorted((layout.tensor, layout.tensor_of("vision")))
    if large % small:
        raise ValueError(f"{prefix}.tp_size {layout.tensor} and vit_tp_size {layout.vision_tensor}: one must divide the other")
    _check_experts(layout, known, prefix)
    table = in_dialect(entries(config), layout.dialect)
    _check_tensor(table, layout, "text", f"{prefix}.tp_size {layout.tensor}")
    if layout.vision:
        name = f"vit_tp_size {layout.vision_tensor}" if layout.vision_tensor else f"tp_size {layout.tensor} (vit_tp_size gives another)"
        _check_tensor(table, layout, "vision", f"{prefix}.{name}")


def _check_experts(layout: Layout, known: Mapping[str, int], prefix: str) -> None:
    experts = known["experts"]
    if layout.expert > 1 and not experts:
        raise ValueError(f"{prefix}.ep_size is {layout.expert} but the model has no experts; pass 1")
    owners = layout.expert * (layout.tensor if layout.tensor_extends_expert else 1)
    if experts % owners:
        fitting = [size for size in range(1, experts + 1) if experts % (size * owners // layout.expert) == 0]
        with_tensor = f" x tp_size {layout.tensor} (moe_tp_extend_ep)" if layout.tensor_extends_expert else ""
        raise ValueError(
            f"{prefix}.ep_size {layout.expert}{with_tensor} does not divide the {experts} experts; {_listed(fitting)} would do"
        )


def _check_tensor(table: Sequence[Entry], layout: Layout, part: Part, given: str) -> None:
    size = layout.tensor_of(part)
    own = [entry for entry in table if _modality(entry) == part and not (layout.tensor_extends_expert and entry.expert is not None)]
    cut_apart = [entry for entry in own if entry.units % size]
    if cut_apart:
        entry = min(cut_apart, key=lambda entry: entry.units)
        fitting = _listed(tensor_sizes(table, part, layout.tensor_extends_expert))
        what = "heads" if entry.groups > 1 or entry.kind == "qkv" else "columns" if entry.split == "columns" else "rows"
        if entry.split == "glu_rows":
            what = "rows in each half"
        raise ValueError(f"{given} does not divide the {entry.units} {what} of {entry.mm}; {fitting} would do")


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _modality(entry: Entry) -> Part:
    return "text" if entry.part == "text" else "vision"


def _check_model_numbers(common: CommonModelConfig, config: Mapping[str, Any]) -> None:
    """Numbers of the model that the user repeats must be those of config.json."""
    known = sizes(config)
    given = {
        "num_experts": (common.num_experts, known["experts"]),
        "num_key_value_heads": (common.num_key_value_heads, known["kv_heads"]),
        "llm_num_layers": (common.llm_num_layers, known["layers"]),
        "vit_num_layers": (common.vit_num_layers, known.get("vision_layers", 0)),
        "audio_num_layers": (common.audio_num_layers, 0),
        "tie_word_embeddings": (common.tie_word_embeddings, is_tied(config)),
    }
    for name, (value, expected) in given.items():
        if value and value != expected:
            raise ValueError(f"common_model_config.{name} is {value} but config.json has {expected}; leave it out")
    if common.llm_hf_dir:
        raise ValueError(f"common_model_config.llm_hf_dir ({common.llm_hf_dir}): text weights of another folder are not offered")
