"""Weights of any kind of folder by classic Hugging Face name, each read when it is asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor

from mindspeed_mm_rl.models.names import PARTS, Entry, Part, Shape, canonical_hf_name, entries, has_value_head, is_buffer, sizes
from mindspeed_mm_rl.models.rank_files import NOTHING_SAID, RankWeights, Unseen
from mindspeed_mm_rl.models.saved_weights import SavedWeights
from mindspeed_mm_rl.models.weight_files import INDEX_FILE, HuggingFaceWeights, WeightFolder, check_parts, recognise, role_of
from mindspeed_mm_rl.models.weight_layout import check_hf_shapes, check_megatron_shapes, check_tied, separate_one

VISION_PARTS: tuple[Part, ...] = ("vision", "projector")
_SCORE, _HEAD = "score.weight", "lm_head.weight"
_TIED = ("model.embed_tokens.weight", _HEAD)
_TIED_MM = ("text_decoder.embedding.word_embeddings.weight", "text_decoder.output_layer.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_FUSED_EXPERTS = re.compile(r"(?P<prefix>.+\.mlp\.experts\.)(?P<what>gate_up_proj|down_proj)$")
_SCALE = ".weight_scale_inv"
_NAN_ABOVE = {
    torch.bfloat16: (numpy.uint16, numpy.int16, 0xFF80, 0x7F80),
    torch.float16: (numpy.uint16, numpy.int16, 0xFC00, 0x7C00),
    torch.float32: (numpy.uint32, numpy.int32, 0xFF800000, 0x7F800000),
}
"""As unsigned numbers the codes of negative NaNs come last, as signed ones those of positive NaNs."""
_CHUNK = 1 << 18


class Source(Protocol):
    """What is converted. `shapes` are those of config.json; names are classic."""

    shapes: Mapping[str, Shape]
    parts: tuple[Part, ...]

    def __getitem__(self, name: str) -> Tensor: ...

    def dtype(self, name: str) -> torch.dtype: ...


class HuggingFaceSource:
    """safetensors under old or new names, experts apart or fused; names and shapes are checked first. Raises ValueError."""

    def __init__(self, folder: Path, config: Mapping[str, Any], parts: Sequence[Part] = PARTS, first_logit: bool = False) -> None:
        """first_logit: the first row of lm_head is the score."""
        self._weights = HuggingFaceWeights(folder)
        table = entries(config)
        _refuse_scales(folder, self._weights)
        self.left_out = _beyond_last_layer(self._weights, config)
        """Names of prediction layers behind the last one, which are not converted."""
        self._names = {canonical_hf_name(name): name for name in self._weights if not is_buffer(name) and name not in self.left_out}
        self._first_logit = first_logit
        if first_logit:
            self._names[_SCORE] = self._names.pop(_HEAD, "")
            if not self._names[_SCORE]:
                raise ValueError(f"{folder}: orm_head is first_logit, but there is no {_HEAD} to take it from; leave it out")
        self._fused = _fused(self._names, table)
        found = {name: self._weights.shapes[there] for name, there in self._names.items() if not _FUSED_EXPERTS.match(name)}
        if first_logit:
            found[_SCORE] = (1, found[_SCORE][1])
        found |= {name: self._fused_shape(name) for name in self._fused}
        try:
            check_hf_shapes(found, config, parts)
            if set(_TIED) <= found.keys():
                check_tied({name: self[name] for name in _TIED}, table, _TIED)
        except ValueError as error:
            hint = " (if the reward is the first logit, as in Nemotron reward models, add orm_head first_logit)"
            raise ValueError(f"{folder}: {error}{hint if has_value_head(config) and _HEAD in found else ''}") from error
        self.parts = tuple(parts)
        self.shapes = _wanted(table, parts)
        self.new_names = any(name != canonical_hf_name(name) for name in self._weights)

    def __getitem__(self, name: str) -> Tensor:
        if name == _SCORE and self._first_logit:
            return self._weights.part(self._names[name], 0)[None]
        if name not in self._fused:
            return self._weights[self._names[name]]
        fused, expert, rows = self._fused[name]
        tensor = self._weights.part(self._names[fused], expert)
        if rows is None:
            return tensor
        half = tensor.shape[0] // 2
        return tensor.narrow(0, rows * half, half)

    def dtype(self, name: str) -> torch.dtype:
        return self._weights.dtype(self._names[self._fused[name][0] if name in self._fused else name])

    def _fused_shape(self, name: str) -> Shape:
        fused, _, rows = self._fused[name]
        first, *rest = self._weights.shapes[self._names[fused]][1:]
        return (first if rows is None else first // 2, *rest)


class RankSource(RankWeights):
    """Files of the ranks of MindSpeed-MM, megatron or MindSpeed-LLM."""


class SavedSource:
    """A training save (torch_dist)."""

    def __init__(self, folder: Path, config: Mapping[str, Any], parts: Sequence[Part] = PARTS) -> None:
        self._weights = SavedWeights(folder)
        table = entries(config)
        try:
            check_megatron_shapes(self._weights.shapes, config, parts)
            if set(_TIED_MM) <= self._weights.keys():
                check_tied({name: self._weights[name] for name in _TIED_MM}, table, _TIED_MM)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        self._entries = {name: (entry, index) for entry in table for index, name in enumerate(entry.hf)}
        self.shapes = _wanted(table, parts)
        self.parts = tuple(parts)
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        entry, index = self._entries[name]
        # q, k and v are asked for one after the other.
        last = self._last
        if last is None or last[0] != entry.mm:
            self._last = last = (entry.mm, self._weights[entry.mm])
        return separate_one(entry, last[1], index)

    def dtype(self, name: str) -> torch.dtype:
        return self._weights.dtype(self._entries[name][0].mm)


def open_source(
    found: WeightFolder, config: Mapping[str, Any], parts: Sequence[Part] = PARTS, unseen: Unseen = NOTHING_SAID, first_logit: bool = False
) -> HuggingFaceSource | RankSource | SavedSource:
    """The weights of a recognised folder; names and shapes of all of them are checked against config.json. Raises ValueError."""
    match found.kind:
        case "hf":
            return HuggingFaceSource(found.weights, config, parts, first_logit)
        case "mm" | "ranks":
            return RankSource(found.ranks, config, unseen)
        case "training":
            return SavedSource(found.weights, config, parts)


def source_of(folder: str | Path, config: Mapping[str, Any], parts: Sequence[Part] = PARTS) -> HuggingFaceSource | RankSource | SavedSource:
    """The weights of config.json's model in any kind of folder. Raises ValueError when it holds none, or those of another model."""
    source = open_source(recognise(folder, role_of(config)), config, parts)
    check_parts(folder, source.parts, parts)
    return source


def different_vision(left: Source, right: Source, config: Mapping[str, Any]) -> str:
    """Megatron name of the first weight in which the vision encoders of two models of one config.json differ; empty if in none."""
    wanted = (entry for entry in entries(config) if entry.part in VISION_PARTS)
    return next((entry.mm for entry in wanted if not all(torch.equal(left[name], right[name]) for name in entry.hf)), "")


def known_names(folder: Path) -> dict[str, str]:
    """A Hugging Face folder's own weight names by classic name, and nothing for a folder without weights."""
    return {canonical_hf_name(name): name for name in HuggingFaceWeights(folder)} if any(folder.glob("*.safetensors")) else {}


def known_files(folder: Path) -> dict[str, str]:
    """The weight_map of a folder's index; empty without one."""
    index = folder / INDEX_FILE
    return dict(json.loads(index.read_text())["weight_map"]) if index.is_file() else {}


def sound(name: str, tensor: Tensor) -> Tensor:
    """The tensor itself. Raises ValueError when it holds NaN: a model that was broken when it was saved."""
    codes = _NAN_ABOVE.get(tensor.dtype)
    if codes is None or not tensor.numel():
        return tensor
    unsigned, signed, negative, positive = codes
    values = tensor.contiguous().flatten().view(torch.uint8).numpy()
    for start in range(0, len(values), _CHUNK):
        chunk = values[start : start + _CHUNK]
        if chunk.view(unsigned).max() > negative or chunk.view(signed).max() > positive:
            count = int(torch.isnan(tensor).sum())
            raise ValueError(f"{name} holds {count} NaN of {tensor.numel()} values: the model was broken when it was saved; take another")
    return tensor


def _wanted(table: Sequence[Entry], parts: Sequence[Part]) -> dict[str, Shape]:
    return {name: shape for entry in table if entry.part in parts for name, shape in zip(entry.hf, entry.hf_shapes, strict=True)}


def _refuse_scales(folder: Path, weights: HuggingFaceWeights) -> None:
    scaled = [name for name in weights if name.endswith(_SCALE)]
    if scaled:
        raise ValueError(
            f"{folder} holds 8-bit weights with scales ({len(scaled)}, as {scaled[0]}); convert the model to bfloat16 first: nothing is "
            "rounded here"
        )


def _beyond_last_layer(weights: HuggingFaceWeights, config: Mapping[str, Any]) -> frozenset[str]:
    """Weights of layers that predict further tokens (num_nextn_predict_layers): transformers doesn't load them either."""
    if not config.get("num_nextn_predict_layers"):
        return frozenset()
    layers = sizes(config)["layers"]
    matches = {name: _LAYER.match(canonical_hf_name(name)) for name in weights}
    return frozenset(name for name, match in matches.items() if match is not None and int(match[1]) >= layers)


def _fused(names: Mapping[str, str], table: Sequence[Entry]) -> dict[str, tuple[str, int, int | None]]:
    """Weight of one expert -> the fused tensor (transformers 5 has them so in memory), its index, and its half (0 gate, 1 up) or None."""
    if not any(_FUSED_EXPERTS.match(name) for name in names):
        return {}
    places: dict[str, tuple[str, int, int | None]] = {}
    for entry in table:
        if entry.expert is None:
            continue
        prefix = entry.hf[0].split(f".experts.{entry.expert}.")[0] + ".experts."
        fused = prefix + ("down_proj" if len(entry.hf) == 1 else "gate_up_proj")
        if fused in names:
            places |= {name: (fused, entry.expert, None if len(entry.hf) == 1 else half) for half, name in enumerate(entry.hf)}
    return places
