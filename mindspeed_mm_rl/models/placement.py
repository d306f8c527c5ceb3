"""Which rank's file has which piece of which weight, for every parallel layout; a pure function of the table of names.

A piece is an entry of its own with smaller shapes, and a cut for each of its Hugging Face tensors: cutting comes before joining, so that a
rank's piece of a joined weight is made of the rows that it needs alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from mindspeed_mm_rl.models.dialects import MM, Dialect
from mindspeed_mm_rl.models.names import OUTPUT_LAYER, Entry, Part, Shape

Stages = tuple[tuple[int, ...], ...]
"""Layers by virtual stage, then by pipeline rank: ((14, 14),) or, with two virtual stages, ((7, 7), (7, 7))."""


@dataclass(frozen=True)
class Layout:
    """Example: Layout(text=((14, 14),), vision=((32, 0),), tensor=4)."""

    text: Stages
    vision: Stages = ()
    """Empty for a model without a vision encoder."""
    tensor: int = 1
    vision_tensor: int = 0
    """0 = as tensor."""
    expert: int = 1
    tensor_extends_expert: bool = False
    """Experts are dealt to the ranks of both groups and never cut, instead of dealt to one and cut by the other."""
    dialect: Dialect = MM
    separate_output: bool = False
    """The files of a tied model have the output layer as a copy; always so with more than one pipeline rank."""

    @property
    def pipeline(self) -> int:
        return len(self.text[0])

    @property
    def virtual(self) -> int:
        return len(self.text)

    @property
    def tensor_ranks(self) -> int:
        return max(self.tensor, self.vision_tensor)

    def tensor_of(self, part: Part) -> int:
        return self.tensor if part == "text" else self.vision_tensor or self.tensor

    def stages_of(self, part: Part) -> list[int]:
        """Layers of the part's modality in the order in which the model runs through the stages."""
        return [layers for virtual in (self.text if part == "text" else self.vision) for layers in virtual]


@dataclass(frozen=True)
class Rank:
    tensor: int = 0
    pipeline: int = 0
    expert: int = 0

    def folder(self, layout: Layout) -> str:
        """Example: mp_rank_01_002 for tensor rank 1 and pipeline rank 2."""
        name = f"mp_rank_{self.tensor:02d}"
        name += f"_{self.pipeline:03d}" if layout.pipeline > 1 else ""
        return name + (f"_{self.expert:03d}" if layout.expert > 1 else "")


@dataclass(frozen=True)
class Cut:
    """Rows (dim 0) or columns (dim 1) start..stop of a Hugging Face tensor; with several blocks, of each of its equal blocks along dim.

    Rows beyond the end repeat the last one: a padded vocabulary.
    """

    dim: int
    start: int
    stop: int
    blocks: int = 1


@dataclass(frozen=True)
class Piece:
    name: str
    """In the rank's file: layers and experts counted from the stage's own first one."""
    entry: Entry
    """Its shapes and groups are those of the piece."""
    cuts: tuple[Cut | None, ...]
    """For each of entry.hf; None: the whole tensor."""


@dataclass(frozen=True)
class RankFile:
    rank: Rank
    folder: str
    models: dict[str, tuple[Piece, ...]]
    """By the key in the file: model, or model0, model1, ... with virtual stages."""


def placement(entries: Sequence[Entry], layout: Layout) -> Iterator[RankFile]:
    """What every rank's file holds. entries: already in layout.dialect (dialects.in_dialect)."""
    stages = _stages(entries, layout)
    experts = 1 + max((entry.expert for entry in entries if entry.expert is not None), default=-1)
    for expert in range(layout.expert):
        for tensor in range(layout.tensor_ranks):
            for pipeline in range(layout.pipeline):
                rank = Rank(tensor, pipeline, expert)
                models = {
                    "model" if layout.virtual == 1 else f"model{virtual}": tuple(
                        _pieces(stages[virtual * layout.pipeline + pipeline], rank, layout, experts)
                    )
                    for virtual in range(layout.virtual)
                }
                yield RankFile(rank, rank.folder(layout), models)


def expert_owners(layout: Layout) -> int:
    return layout.expert * (layout.tensor_ranks if layout.tensor_extends_expert else 1)


def _stages(entries: Sequence[Entry], layout: Layout) -> list[list[tuple[Entry, int | None]]]:
    """Entries of each stage with their layer's number in it."""
    stages: list[list[tuple[Entry, int | None]]] = [[] for _ in range(layout.pipeline * layout.virtual)]
    for entry in entries:
        stage, local = where(entry, layout.stages_of(entry.part))
        stages[stage].append((entry, local))
    return stages


def where(entry: Entry, counts: Sequence[int]) -> tuple[int, int | None]:
    if entry.layer is None:
        used = [stage for stage, count in enumerate(counts) if count]
        return (used[0] if entry.place == "first" else used[-1]), None
    ends = list(accumulate(counts))
    stage = next(stage for stage, end in enumerate(ends) if entry.layer < end)
    return stage, entry.layer - (ends[stage] - counts[stage])


def _pieces(stage: Sequence[tuple[Entry, int | None]], rank: Rank, layout: Layout, experts: int) -> Iterator[Piece]:
    own = _own_experts(rank, layout, experts)
    grouped: dict[tuple[int | None, str], list[Entry]] = {}
    for entry, local in stage:
        if entry.expert is None:
            yield cut(entry, entry.local_name(local), rank.tensor % layout.tensor_of(entry.part), layout.tensor_of(entry.part))
        elif entry.expert in own and layout.dialect.experts == "grouped":
            grouped.setdefault((local, entry.kind), []).append(entry)
        elif entry.expert in own:
            yield _expert(entry, entry.local_name(local, entry.expert - own.start), rank, layout)
    for (local, kind), members in grouped.items():
        yield _grouped(members, local, kind, rank, layout)


def _own_experts(rank: Rank, layout: Layout, total: int) -> range:
    each = total // expert_owners(layout)
    owner = rank.expert * layout.tensor_ranks + rank.tensor if layout.tensor_extends_expert else rank.expert
    return range(owner * each, (owner + 1) * each)


def _expert(entry: Entry, name: str, rank: Rank, layout: Layout) -> Piece:
    return cut(entry, name, 0, 1) if layout.tensor_extends_expert else cut(entry, name, rank.tensor % layout.tensor, layout.tensor)


def _grouped(members: Sequence[Entry], local: int | None, kind: str, rank: Rank, layout: Layout) -> Piece:
    """One matrix of all experts: weight1 of gates and ups, weight2 of downs."""
    pieces = [_expert(entry, "", rank, layout) for entry in members]
    first = kind == "gate_up"
    name = members[0].pattern.split(".local_experts.")[0].format(n=local) + (".weight1" if first else ".weight2")
    entry = replace(
        members[0],
        mm=name,
        hf=tuple(name for piece in pieces for name in piece.entry.hf),
        kind="grouped_fc1" if first else "grouped_fc2",
        hf_shapes=tuple(shape for piece in pieces for shape in piece.entry.hf_shapes),
    )
    return Piece(name, entry, tuple(each for piece in pieces for each in piece.cuts))


def cut(entry: Entry, name: str, index: int, size: int) -> Piece:
    """The piece of tensor rank `index` of `size`. Raises ValueError when the cut would leave a remainder or go through a head."""
    if size == 1 and not entry.padded_rows:
        return Piece(name, entry, (None,) * len(entry.hf))
    if entry.split == "replicated":
        return Piece(name, entry, (None,) * len(entry.hf))
    if entry.units % size:
        raise ValueError(f"{entry.mm} can be cut into {entry.units} equal pieces at most, which {size} tensor ranks do not divide")
    dim = 1 if entry.split == "columns" else 0
    blocks = 3 if entry.split == "row_thirds" or entry.kind == "vision_qkv" else 1
    cuts, shapes = [], []
    for shape in entry.hf_shapes:
        length = (entry.padded_rows or shape[dim]) // blocks // size
        cuts.append(Cut(dim, index * length, (index + 1) * length, blocks))
        shapes.append(_with(shape, dim, length * blocks))
    groups = max(1, entry.groups // size)
    return Piece(name, replace(entry, hf_shapes=tuple(shapes), groups=groups, padded_rows=0), tuple(cuts))


def _with(shape: Shape, dim: int, length: int) -> Shape:
    return (*shape[:dim], length, *shape[dim + 1 :])


def with_output(entries: Sequence[Entry], output: Entry | None) -> list[Entry]:
    """The entries and, where the files of a tied model have one, the copy of the embedding that serves as the output layer."""
    if output is None or any(entry.mm == OUTPUT_LAYER for entry in entries):
        return list(entries)
    return [*entries, output]
