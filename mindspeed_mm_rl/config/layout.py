"""How a role's keys lay its network out over processes, as far as it isn't plain copying."""

from __future__ import annotations

from typing import Any

from mindspeed_mm_rl.config.schema import MegatronConfig

Stages = tuple[tuple[int, ...], ...]
"""Layers by virtual stage, then by pipeline rank. Example: ((7, 7), (7, 7)) is 28 layers on two ranks that hold two pieces each."""

MODEL_FILE_SPLIT = "model: text_decoder.pipeline_num_layers"
_PIPELINE, _VIRTUAL = "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
_OF_VIRTUAL = "num_layers_per_virtual_pipeline_stage"


def pipeline_layers(section: str, keys: MegatronConfig, model_file_split: Any, layers: int | None) -> Stages:
    """() where every rank holds one piece and no key says its size; num_layer_list goes before the model file.

    layers: of the text decoder; None where there is no config.json to say it. Raises ValueError for keys that contradict each other.
    """
    stages, virtual = keys.pipeline_model_parallel_size, _virtual_stages(section, keys, layers)
    if keys.num_layer_list is not None:
        key, split = f"{section}.num_layer_list", (keys.num_layer_list,)
    else:
        key, split = MODEL_FILE_SPLIT, _by_virtual_stage(model_file_split)
    if not split:
        return _even(section, stages, virtual or 1, layers)
    _check_split(section, key, split, stages, virtual, layers)
    return () if stages == 1 else split


def _by_virtual_stage(split: Any) -> Stages:
    nested = split if split and isinstance(split[0], list) else [split] if split else []
    return tuple(tuple(row) for row in nested)


def _virtual_stages(section: str, keys: MegatronConfig, layers: int | None) -> int | None:
    """Pieces of the network on each rank; None where no key says it."""
    stages, virtual, size = (getattr(keys, key) for key in (_PIPELINE, _VIRTUAL, _OF_VIRTUAL))
    told = f"{section}.{_VIRTUAL} ({virtual})" if size is None else f"{section}.{_OF_VIRTUAL} ({size})"
    if size is not None:
        pieces = stages * size
        if _known(told, layers) % pieces:
            raise ValueError(
                f"{told} x {section}.{_PIPELINE} ({stages}) = {pieces} must divide the model's {layers} layers; a product of "
                f"{listed(divisors(layers))} would do"
            )
        if virtual not in (None, layers // pieces):
            raise ValueError(f"{told} makes {layers // pieces} virtual stages, but {section}.{_VIRTUAL} is {virtual}; remove one of them")
        virtual = layers // pieces
    if virtual is not None and virtual > 1 and stages == 1:
        raise ValueError(
            f"{told} needs {section}.{_PIPELINE} > 1, which is 1: virtual stages alternate over pipeline ranks; remove it, or set "
            f"{_PIPELINE} to 2 or more"
        )
    return virtual


def _even(section: str, stages: int, virtual: int, layers: int | None) -> Stages:
    """One piece per rank may be a layer more or less than another's; interleaved ones are of one size, as megatron's are."""
    told = f"{section}.{_PIPELINE} ({stages})"
    if virtual == 1:
        if layers is not None and layers < stages:
            raise ValueError(f"{told} must be <= the model's {layers} layers; lower it")
        return ()
    pieces = stages * virtual
    told = f"{told} x {section}.{_VIRTUAL} ({virtual}) = {pieces}"
    if _known(told, layers) % pieces:
        raise ValueError(
            f"{told} must divide the model's {layers} layers; a product of {listed(divisors(layers))} would do, or {MODEL_FILE_SPLIT} by "
            "virtual stage"
        )
    return ((layers // pieces,) * stages,) * virtual


def _check_split(section: str, key: str, split: Stages, stages: int, virtual: int | None, layers: int | None) -> None:
    told = f"{key} {[list(row) for row in split] if len(split) > 1 else list(split[0])}"
    total, would_do = sum(map(sum, split)), f"'{_uneven(stages, layers)}' would do" if layers and len(split) == 1 else "change it"
    if any(len(row) != stages for row in split):
        rows = "each list" if len(split) > 1 else "it"
        raise ValueError(f"{told}: {rows} must have one number for each of {section}.{_PIPELINE} ({stages}); {would_do}")
    if virtual not in (None, len(split)):
        raise ValueError(f"{told} is {len(split)} virtual stage(s), but {section} asks for {virtual} ({_VIRTUAL}); remove one of them")
    if len(split) > 1 and stages == 1:
        raise ValueError(f"{told} is {len(split)} virtual stages, which need {section}.{_PIPELINE} > 1, which is 1; give one list")
    if min(map(min, split)) < 1:
        raise ValueError(f"{told} must give every stage at least one layer; {would_do}")
    if layers not in (None, total):
        raise ValueError(f"{told} sums to {total}, but the model has {layers} layers; {would_do}")


def _uneven(stages: int, layers: int) -> str:
    """Example: 10 layers on 3 stages -> "4,3,3"."""
    base, longer = divmod(layers, stages)
    return ",".join([str(base + 1)] * longer + [str(base)] * (stages - longer))


def _known(told: str, layers: int | None) -> int:
    if layers is None:
        raise ValueError(
            f"{told} needs the model's number of layers, but megatron_training.tokenizer_name_or_path names no folder with a config.json; "
            "correct the path"
        )
    return layers


def expert_sizes(section: str, keys: MegatronConfig) -> tuple[int, int]:
    """(processes that share the experts, processes that share each of them).

    moe_tp_extend_ep: experts stay whole, and are dealt out over the tensor-parallel processes too.
    """
    tensor, expert, of_each = keys.tensor_model_parallel_size, keys.expert_model_parallel_size, keys.expert_tensor_parallel_size
    if keys.moe_tp_extend_ep:
        if of_each not in (None, 1):
            raise ValueError(
                f"{section}.moe_tp_extend_ep (true) keeps experts whole, but {section}.expert_tensor_parallel_size is {of_each}; set it to "
                "1, or moe_tp_extend_ep to false"
            )
        return expert * tensor, 1
    if expert == 1 and of_each not in (None, tensor):
        # Megatron then takes an expert's gradient for one that every tensor-parallel process has whole, and never sums it.
        raise ValueError(
            f"{section}.expert_tensor_parallel_size ({of_each}) must be {section}.tensor_model_parallel_size ({tensor}) while "
            f"{section}.expert_model_parallel_size is 1, or gradients of the experts would be wrong; remove it, or set moe_tp_extend_ep "
            "to true"
        )
    return expert, of_each or (tensor if expert == 1 else 1)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def listed(numbers: list[int]) -> str:
    """Example: [1, 2, 4] -> "1, 2 or 4"."""
    *before, last = [str(number) for number in numbers]
    return f"{', '.join(before)} or {last}" if before else last
