"""Weights between the Hugging Face and the megatron layout: full tensors of one rank (TP 1, PP 1), values untouched.

The regrouping rows of `names.py` are applied here and nowhere else; both directions are exact inverses, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm_rl.models.names import EMBEDDING, OUTPUT_LAYER, PARTS, Entry, Part, Shape, canonical_hf_name, entries, is_buffer

_TIED_HF = ("model.embed_tokens.weight", "lm_head.weight")
_TIED_MM = (EMBEDDING, OUTPUT_LAYER)
_NAMES_SHOWN = 4


def to_megatron(hf: Mapping[str, Tensor], config: Mapping[str, Any], parts: Sequence[Part] = PARTS) -> dict[str, Tensor]:
    """All megatron weights of a Hugging Face model.

    hf: by classic or transformers 5 names; may be lazy, each tensor is asked for once. config: config.json. parts: which to convert.
    Raises ValueError naming missing or unexpected weights, or one of another shape.
    """
    return dict(iterate_megatron(hf, config, parts))


def iterate_megatron(hf: Mapping[str, Tensor], config: Mapping[str, Any], parts: Sequence[Part] = PARTS) -> Iterator[tuple[str, Tensor]]:
    """`to_megatron`, one weight at a time; names are checked before the first one."""
    table = entries(config)
    source = {canonical_hf_name(name): name for name in hf if not is_buffer(name)}
    wanted = [entry for entry in table if entry.part in parts]
    check_names(source, {n for e in wanted for n in e.hf}, {n for e in table for n in e.hf}, _TIED_HF, "Hugging Face")
    check_tied({name: hf[source[name]] for name in _TIED_HF if name in source}, table, _TIED_HF)
    for entry in wanted:
        tensors = [hf[source[name]] for name in entry.hf]
        for name, tensor, shape in zip(entry.hf, tensors, entry.hf_shapes, strict=True):
            check_shape(name, tensor.shape, shape)
        yield entry.mm, join(entry, tensors)


def select_megatron(mm: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights that config.json describes, without the copy of a tied embedding or the buffers that a file may hold beside them."""
    table = entries(config)
    check_tied({name: mm[name] for name in _TIED_MM if name in mm}, table, _TIED_MM)
    return {entry.mm: mm[entry.mm] for entry in table}


def to_hf(mm: Mapping[str, Tensor], config: Mapping[str, Any], parts: Sequence[Part] = PARTS) -> Iterator[tuple[str, Tensor]]:
    """The inverse, as (classic Hugging Face name, tensor); what is not regrouped is a view of the given tensor.

    mm may be lazy. Raises ValueError naming missing or unexpected weights before the first one, or one of another shape.
    """
    table = entries(config)
    source = {name for name in mm if not is_buffer(name)}
    wanted = [entry for entry in table if entry.part in parts]
    check_names(source, {e.mm for e in wanted}, {e.mm for e in table}, _TIED_MM, "megatron")
    check_tied({name: mm[name] for name in _TIED_MM if name in source}, table, _TIED_MM)
    for entry in wanted:
        tensor = mm[entry.mm]
        check_shape(entry.mm, tensor.shape, entry.mm_shape)
        yield from zip(entry.hf, separate(entry, tensor), strict=True)


def check_hf_shapes(shapes: Mapping[str, Shape], config: Mapping[str, Any], parts: Sequence[Part] = PARTS) -> None:
    """Names and shapes of a Hugging Face model against config.json, without its tensors; raises ValueError as `to_megatron` does."""
    table = entries(config)
    found = {canonical_hf_name(name): shape for name, shape in shapes.items() if not is_buffer(name)}
    wanted = {name: shape for e in table if e.part in parts for name, shape in zip(e.hf, e.hf_shapes, strict=True)}
    check_names(found, set(wanted), {name for e in table for name in e.hf}, _TIED_HF, "Hugging Face")
    for name, shape in wanted.items():
        check_shape(name, found[name], shape)


def check_megatron_shapes(shapes: Mapping[str, Shape], config: Mapping[str, Any], parts: Sequence[Part] = PARTS) -> None:
    """The same for megatron names; raises ValueError as `to_hf` does."""
    table = entries(config)
    wanted = {e.mm: e.mm_shape for e in table if e.part in parts}
    check_names({name for name in shapes if not is_buffer(name)}, set(wanted), {e.mm for e in table}, _TIED_MM, "megatron")
    for name, shape in wanted.items():
        check_shape(name, shapes[name], shape)


def join(entry: Entry, tensors: Sequence[Tensor]) -> Tensor:
    """The megatron weight of an entry's Hugging Face tensors (in the order of entry.hf)."""
    parts = parts_in_order(entry, tensors)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def parts_in_order(entry: Entry, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same as blocks of rows, one behind the other: views of the given tensors where nothing is transposed."""
    match entry.kind:
        case "gate_up":
            return list(tensors)
        case "vision_qkv":
            return [rows for head in tensors[0].unflatten(0, (3, entry.groups, -1)).transpose(0, 1) for rows in head]
        case "qkv":
            per_group = [tensor.unflatten(0, (entry.groups, -1)) for tensor in tensors]
            return [rows[group] for group in range(entry.groups) for rows in per_group]
        case "grouped_fc1":
            experts = [torch.cat(list(tensors[n : n + 2])).t() for n in range(0, len(tensors), 2)]
            return [torch.stack(experts).reshape(entry.mm_shape)]
        case "grouped_fc2":
            return [torch.stack([tensor.t() for tensor in tensors]).flatten(0, 1)]
    return [tensors[0]]


def separate(entry: Entry, tensor: Tensor) -> tuple[Tensor, ...]:
    """The Hugging Face tensors of an entry's megatron weight."""
    return tuple(separate_one(entry, tensor, index) for index in range(len(entry.hf)))


def separate_one(entry: Entry, tensor: Tensor, index: int) -> Tensor:
    """The Hugging Face tensor entry.hf[index] alone."""
    rows = [shape[0] for shape in entry.hf_shapes]
    match entry.kind:
        case "copy":
            return tensor
        case "gate_up":
            return tensor.narrow(0, sum(rows[:index]), rows[index])
        case "vision_qkv":
            return tensor.unflatten(0, (entry.groups, 3, -1)).transpose(0, 1).flatten(0, 2)
        case "qkv":
            per_group = [count // entry.groups for count in rows]
            return tensor.unflatten(0, (entry.groups, -1)).narrow(1, sum(per_group[:index]), per_group[index]).flatten(0, 1)
        case "grouped_fc1":
            expert = tensor.view(len(rows) // 2, tensor.shape[0], -1)[index // 2].t()
            return expert.narrow(0, rows[index - 1] if index % 2 else 0, rows[index])
        case "grouped_fc2":
            return tensor.unflatten(0, (len(rows), -1))[index].t()


def check_shape(name: str, shape: Sequence[int], expected: Shape) -> None:
    if tuple(shape) != expected:
        raise ValueError(
            f"{name} has shape {list(shape)} but config.json asks for {list(expected)}; take weights and config.json of one model"
        )


def check_names(have: Mapping[str, Any] | set[str], wanted: set[str], known: set[str], tied: tuple[str, str], layout: str) -> None:
    """Raises ValueError when `wanted` names are missing or names outside `known` (and the tied pair) are present."""
    missing = sorted(wanted - set(have))
    unexpected = sorted(set(have) - known - set(tied))
    problems = [f"{len(names)} {what} ({_some(names)})" for what, names in (("missing", missing), ("unexpected", unexpected)) if names]
    if problems:
        raise ValueError(f"{layout} weights do not fit config.json: {' and '.join(problems)}; take weights and config.json of one model")


def check_tied(pair: Mapping[str, Tensor], table: Sequence[Entry], names: tuple[str, str]) -> None:
    """A tied model may carry its output layer a second time, but only as a copy of the embedding."""
    untied = any(entry.mm == OUTPUT_LAYER for entry in table)
    if untied or len(pair) < len(names) or torch.equal(pair[names[0]], pair[names[1]]):
        return
    raise ValueError(
        f"config.json says tie_word_embeddings: true but {names[1]} differs from {names[0]}; set tie_word_embeddings: false to keep both"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
