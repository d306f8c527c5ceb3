"""Weights of a folder of mp_rank_* files, however it is split: the layout is read off the files, tensors come by Hugging Face name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm_rl.models.dialects import Dialect, Experts, VisionQkv, in_dialect
from mindspeed_mm_rl.models.name_rules import Part
from mindspeed_mm_rl.models.names import PARTS, Entry, entries, has_value_head, is_buffer, is_tied, sizes, tied_output
from mindspeed_mm_rl.models.placement import Cut, Layout, Piece, Stages, placement, with_output
from mindspeed_mm_rl.models.torch_files import read_models
from mindspeed_mm_rl.models.weight_layout import separate_one

MODEL_FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(?:local_experts\.|linear_fc\d\.weight)(\d+)")
_VISION = "image_encoder."
_PLAIN_TEXT = ("embedding.", "decoder.", "output_layer.")

Content = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Unseen:
    """What the files of ranks can't show, so that it has to be said."""

    vision_qkv: VisionQkv = "per_head"
    tensor_extends_expert: bool | None = None
    """With --moe-grouped-gemm and several tensor ranks: half of all experts and all halves of them have one shape. None: not said."""


NOTHING_SAID = Unseen()


@dataclass(frozen=True)
class Ranks:
    """The files of a folder by tensor, pipeline and expert rank, and how many there are of each."""

    folder: Path
    files: dict[tuple[int, int, int], Path]
    contents: dict[tuple[int, int, int], Content] = field(repr=False)

    @property
    def counts(self) -> tuple[int, int, int]:
        return tuple(max(rank[axis] for rank in self.files) + 1 for axis in range(3))

    def names(self, tensor: int = 0, expert: int = 0) -> Iterator[tuple[int, int, str, Tensor]]:
        """(pipeline rank, virtual stage, name, tensor) of one tensor and expert rank."""
        for pipeline in range(self.counts[1]):
            content = self.contents[tensor, pipeline, expert]
            # model10 stands behind model9.
            for virtual, key in enumerate(sorted(content, key=lambda key: (len(key), key))):
                for name, value in content[key].items():
                    yield pipeline, virtual, name, value


def open_ranks(folder: Path) -> Ranks:
    """Raises ValueError when a rank's file is missing or damaged."""
    found = {}
    for file in sorted(folder.glob(f"mp_rank_*/{MODEL_FILE}")):
        match = _RANK.fullmatch(file.parent.name)
        if match is None:
            raise ValueError(f"{file.parent} is not named mp_rank_TT[_PPP][_EEE]: it is not what mm-convert or megatron write")
        found[tuple(int(number) for number in match.groups() if number is not None)] = file
    if not found:
        raise ValueError(f"{folder} holds no mp_rank_*/{MODEL_FILE}: the save is incomplete")
    lengths = {len(rank) for rank in found}
    if len(lengths) > 1:
        raise ValueError(f"{folder} mixes {' and '.join(sorted(path.parent.name for path in found.values())[:2])}: which of them is meant?")
    contents = {rank: read_models(path) for rank, path in found.items()}
    order = _order(lengths.pop(), contents)
    files = {order(rank): path for rank, path in found.items()}
    ranks = Ranks(folder, files, {order(rank): content for rank, content in contents.items()})
    _check_complete(ranks)
    return ranks


def _order(length: int, contents: Mapping[tuple[int, ...], Content]) -> Any:
    """How a folder's numbers become (tensor, pipeline, expert): one number behind the first may be either of the two."""
    if length == 3:
        return lambda rank: rank
    if length == 1:
        return lambda rank: (rank[0], 0, 0)
    names = [{name for model in content.values() for name in model} for content in contents.values()]
    is_expert = any(_EXPERT.search(name) or ".experts.weight" in name for name in names[0]) and all(each == names[0] for each in names)
    return (lambda rank: (rank[0], 0, rank[1])) if is_expert else (lambda rank: (rank[0], rank[1], 0))


def _check_complete(ranks: Ranks) -> None:
    tensor, pipeline, expert = ranks.counts
    missing = [(t, p, e) for t in range(tensor) for p in range(pipeline) for e in range(expert) if (t, p, e) not in ranks.files]
    if missing:
        t, p, e = missing[0]
        raise ValueError(
            f"{ranks.folder} has {len(ranks.files)} of {tensor * pipeline * expert} rank files: tensor rank {t}, pipeline rank {p}"
            + (f", expert rank {e}" if expert > 1 else "")
            + " is missing; copy the folder again"
        )
    keys = {rank: tuple(sorted(content)) for rank, content in ranks.contents.items()}
    if len(set(keys.values())) > 1:
        raise ValueError(f"{ranks.folder}: the rank files differ in their virtual stages ({sorted(set(keys.values()))})")


def read_layout(ranks: Ranks, config: Mapping[str, Any], unseen: Unseen) -> Layout:
    """The layout that the files show. Raises ValueError when they do not fit config.json, or need more said than `unseen` says."""
    names = {name for *_, name, _ in ranks.names()}
    layout = Layout(
        text=read_stages(ranks, vision=False),
        vision=read_stages(ranks, vision=True) if "vision_config" in config else (),
        tensor=ranks.counts[0],
        expert=ranks.counts[2],
        dialect=replace(read_names(ranks), vision_qkv=unseen.vision_qkv),
        separate_output=is_tied(config) and not has_value_head(config) and any(name.endswith("output_layer.weight") for name in names),
    )
    parts = parts_of(names)
    _check_layers(ranks, layout, config, parts)
    tried = [(candidate, _problems(ranks, candidate, config, parts, 1)) for candidate in _candidates(layout, ranks, sizes(config))]
    fewest = min(len(problems) for _, problems in tried)
    return _said([candidate for candidate, problems in tried if len(problems) == fewest], ranks.folder, unseen)


def _said(candidates: Sequence[Layout], folder: Path, unseen: Unseen) -> Layout:
    """The one of several layouts, all of which fit the files, that is meant."""
    extends = {candidate.tensor_extends_expert for candidate in candidates}
    if len(extends) > 1 and unseen.tensor_extends_expert is None:
        raise ValueError(
            f"{folder}: the files don't show whether the experts were dealt to the tensor ranks (--moe-tp-extend-ep) or cut by them; "
            "say it with moe_tp_extend_ep true or false in the format options"
        )
    if unseen.tensor_extends_expert is not None and len(extends) > 1:
        candidates = [candidate for candidate in candidates if candidate.tensor_extends_expert == unseen.tensor_extends_expert]
    return candidates[0]


def read_names(ranks: Ranks) -> Dialect:
    """The dialect as far as names show it."""
    names = {name for *_, name, _ in ranks.names()}
    return Dialect(
        prefix=not any(name.startswith(_PLAIN_TEXT) for name in names),
        canonical=any(name.endswith("self_attention.q_proj.weight") for name in names),
        experts=_experts(names),
        latent_joined=any(name.endswith("kv_layernorm.weight") for name in names)
        and any(name.endswith("self_attention.linear_qkv.weight") and not name.startswith(_VISION) for name in names),
    )


def parts_of(names: set[str]) -> tuple[Part, ...]:
    """A folder may hold the vision encoder alone."""
    return PARTS if any(not name.startswith(_VISION) for name in names) else ("vision", "projector")


def read_stages(ranks: Ranks, vision: bool) -> Stages:
    """Layers of each stage."""
    last: dict[tuple[int, int], int] = {}
    pipelines, virtuals = ranks.counts[1], len(next(iter(ranks.contents.values())))
    for pipeline, virtual, name, _ in ranks.names():
        layer = _LAYER.search(name)
        if layer is not None and name.startswith(_VISION) == vision:
            last[pipeline, virtual] = max(last.get((pipeline, virtual), 0), int(layer[1]) + 1)
    return tuple(tuple(last.get((pipeline, virtual), 0) for pipeline in range(pipelines)) for virtual in range(virtuals))


def _experts(names: set[str]) -> Experts:
    if any(".experts.weight1" in name for name in names):
        return "grouped"
    return "te_grouped" if any(".experts.linear_fc1.weight" in name for name in names) else "local"


def _check_layers(ranks: Ranks, layout: Layout, config: Mapping[str, Any], parts: Sequence[Part]) -> None:
    known = sizes(config)
    for part, size in (("text", "layers"), ("vision", "vision_layers")):
        counts = layout.stages_of(part)
        if part in parts and known.get(size, 0) != sum(counts):
            raise ValueError(
                f"{ranks.folder} holds {sum(counts)} {part} layers ({counts} by stage) but config.json has {known.get(size, 0)}; "
                "take weights and config.json of one model"
            )


def _candidates(layout: Layout, ranks: Ranks, known: Mapping[str, int]) -> Iterator[Layout]:
    """Text, vision and experts may each be cut into another number of pieces than there are tensor ranks."""
    divisors = [size for size in range(layout.tensor, 0, -1) if layout.tensor % size == 0]
    pairs = [(layout.tensor, size) for size in divisors] + [(size, layout.tensor) for size in divisors[1:]]
    embedding = next((value.shape[0] for *_, name, value in ranks.names() if name.endswith("word_embeddings.weight")), 0)
    for text, vision in pairs if layout.vision else [(layout.tensor, 0)]:
        rows = embedding * text
        dialect = replace(layout.dialect, padded_vocabulary=rows if rows > known["vocab"] else 0)
        for extends in (False, True) if known["experts"] and layout.tensor > 1 else (False,):
            yield replace(
                layout, tensor=text, vision_tensor=vision if vision != text else 0, tensor_extends_expert=extends, dialect=dialect
            )


def spoken_entries(config: Mapping[str, Any], layout: Layout, parts: Sequence[Part] = PARTS) -> list[Entry]:
    """config.json's weights as the files of a layout name and cut them."""
    tied = is_tied(config) and not has_value_head(config) and (layout.pipeline > 1 or layout.separate_output)
    wanted = with_output(entries(config), tied_output(config) if tied else None)
    return in_dialect([entry for entry in wanted if entry.part in parts], layout.dialect)


def _problems(ranks: Ranks, layout: Layout, config: Mapping[str, Any], parts: Sequence[Part], tensor_ranks: int | None = None) -> list[str]:
    """What differs between the files and what a layout says of them."""
    problems = []
    for file in placement(spoken_entries(config, layout, parts), layout):
        if tensor_ranks is not None and (file.rank.tensor >= tensor_ranks or file.rank.expert):
            continue
        where = (file.rank.tensor, file.rank.pipeline, file.rank.expert)
        for key, pieces in file.models.items():
            found = {name: tensor for name, tensor in ranks.contents[where][key].items() if not is_buffer(name)}
            wanted = {piece.name: piece.entry.mm_shape for piece in pieces}
            label = f"{ranks.files[where].parent.name}{'' if key == 'model' else f' {key}'}"
            problems += [f"{label} lacks {name}" for name in wanted.keys() - found.keys()]
            problems += [f"{label} has {name}, which no part of the model is called" for name in found.keys() - wanted.keys()]
            problems += [
                f"{label}: {name} has shape {list(found[name].shape)} instead of {list(shape)}"
                for name, shape in wanted.items()
                if name in found and tuple(found[name].shape) != shape
            ]
    return problems


@dataclass(frozen=True)
class _Place:
    """Where a piece of a Hugging Face tensor lies: the piece's index-th part, which fills the cut."""

    rank: tuple[int, int, int]
    key: str
    piece: Piece
    index: int

    @property
    def cut(self) -> Cut | None:
        return self.piece.cuts[self.index]


class RankWeights(Mapping[str, Tensor]):
    """The weights of all ranks by classic Hugging Face name; a tensor is put together when it is asked for.

    A part that several ranks have must be the same in all of them. Raises ValueError when files and config.json do not agree, naming both.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], unseen: Unseen = NOTHING_SAID) -> None:
        self.ranks = open_ranks(folder)
        self.layout = read_layout(self.ranks, config, unseen)
        self.parts = parts_of({name for *_, name, _ in self.ranks.names()})
        problems = _problems(self.ranks, self.layout, config, self.parts)
        if problems:
            more = f", and {len(problems) - 1} more differences" if len(problems) > 1 else ""
            raise ValueError(f"{folder}: {min(problems)}{more}; take weights and config.json of one model")
        self._places: dict[str, list[_Place]] = {}
        for file in placement(spoken_entries(config, self.layout, self.parts), self.layout):
            for key, pieces in file.models.items():
                for piece in pieces:
                    for index, name in enumerate(piece.entry.hf):
                        place = _Place((file.rank.tensor, file.rank.pipeline, file.rank.expert), key, piece, index)
                        self._places.setdefault(name, []).append(place)
        self.shapes = {
            name: shape
            for entry in entries(config)
            if entry.part in self.parts
            for name, shape in zip(entry.hf, entry.hf_shapes, strict=True)
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def dtype(self, name: str) -> torch.dtype:
        place = self._places[name][0]
        return self.ranks.contents[place.rank][place.key][place.piece.name].dtype

    def __getitem__(self, name: str) -> Tensor:
        places: dict[Cut | None, list[_Place]] = {}
        for place in self._places[name]:
            places.setdefault(place.cut, []).append(place)
        parts = {cut: self._agreed(name, those) for cut, those in places.items()}
        return parts[None] if None in parts else self._filled(name, parts)

    def _agreed(self, name: str, places: Sequence[_Place]) -> Tensor:
        first, *others = (self._part(place) for place in places)
        for place, other in zip(places[1:], others, strict=True):
            if not same_bits(first, other):
                here, there = (self.ranks.files[each.rank].parent.name for each in (places[0], place))
                raise ValueError(f"{self.ranks.folder}: {name} differs between {here} and {there}, which must have the same copy of it")
        return first

    def _part(self, place: _Place) -> Tensor:
        tensor = self.ranks.contents[place.rank][place.key][place.piece.name]
        return separate_one(place.piece.entry, tensor, place.index)

    def _filled(self, name: str, parts: Mapping[Cut | None, Tensor]) -> Tensor:
        whole = torch.empty(self.shapes[name], dtype=self.dtype(name))
        for cut, part in parts.items():
            if cut is not None:
                put(whole, cut, part)
        return whole


def take(tensor: Tensor, cut: Cut | None) -> Tensor:
    """The rows or columns of a cut; beyond the end the last row is repeated."""
    if cut is None:
        return tensor
    if cut.blocks > 1:
        blocks = tensor.unflatten(cut.dim, (cut.blocks, -1))
        return blocks.narrow(cut.dim + 1, cut.start, cut.stop - cut.start).flatten(cut.dim, cut.dim + 1)
    rows = tensor.shape[cut.dim]
    if cut.stop <= rows:
        return tensor.narrow(cut.dim, cut.start, cut.stop - cut.start)
    return tensor.index_select(cut.dim, torch.arange(cut.start, cut.stop).clamp(max=rows - 1))


def put(tensor: Tensor, cut: Cut, part: Tensor) -> None:
    """Writes a cut's rows or columns into their place; rows beyond the end are dropped."""
    if cut.blocks > 1:
        blocks = tensor.unflatten(cut.dim, (cut.blocks, -1))
        blocks.narrow(cut.dim + 1, cut.start, cut.stop - cut.start).copy_(part.unflatten(cut.dim, (cut.blocks, -1)))
        return
    stop = min(cut.stop, tensor.shape[cut.dim])
    if cut.start < stop:
        tensor.narrow(cut.dim, cut.start, stop - cut.start).copy_(part.narrow(cut.dim, 0, stop - cut.start))


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equality that holds for NaN and tells 0 from -0."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return torch.equal(left.contiguous().view(bits), right.contiguous().view(bits))
