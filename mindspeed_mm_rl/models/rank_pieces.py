"""What one training process holds of every weight: a pure function of its place among the processes that share a network.

The files of mm-convert (placement.py) have a rank for each tensor, pipeline and expert number; in training experts have groups of their
own, which cut across the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mindspeed_mm_rl.models.names import Entry, entries, has_value_head, is_tied, tied_output
from mindspeed_mm_rl.models.placement import Piece, Stages, cut, where, with_output
from mindspeed_mm_rl.models.rank_files import take
from mindspeed_mm_rl.models.weight_layout import join
from mindspeed_mm_rl.models.weight_sources import Source


@dataclass(frozen=True)
class Grid:
    """Over how many processes a network is spread. Example: Grid(stages=((14, 14),), tensor=2)."""

    stages: Stages
    """Text layers by virtual stage, then by pipeline rank. The vision encoder is whole in the first stage."""
    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1

    @property
    def pipeline(self) -> int:
        return len(self.stages[0])

    @property
    def virtual(self) -> int:
        return len(self.stages)

    def layer_numbers(self, pipeline: int, virtual: int) -> range:
        """Numbers, over the whole model, of the layers of one stage."""
        counts = [count for stages in self.stages for count in stages]
        stage = virtual * self.pipeline + pipeline
        return range(sum(counts[:stage]), sum(counts[: stage + 1]))


@dataclass(frozen=True)
class GridPlace:
    """One process of a grid."""

    tensor: int = 0
    pipeline: int = 0
    expert: int = 0
    expert_tensor: int = 0


def even_stages(layers: int, pipeline: int) -> Stages:
    """Layers dealt as evenly as may be, what is over to the stages in the middle: the first has the embedding, the last the head.

    Example: even_stages(14, 4) == ((3, 4, 4, 3),)
    """
    each, over = divmod(layers, pipeline)
    start = (pipeline - over) // 2
    return (tuple(each + (start <= stage < start + over) for stage in range(pipeline)),)


def grid_entries(config: Mapping[str, Any], grid: Grid, with_vision: bool = True) -> list[Entry]:
    """The weights of a model as its processes hold them: a tied output layer is a weight of its own where the embedding is elsewhere."""
    table = [entry for entry in entries(config) if with_vision or entry.part == "text"]
    needs_output = is_tied(config) and not has_value_head(config) and grid.pipeline > 1
    return with_output(table, tied_output(config) if needs_output else None)


def chunk_pieces(table: Sequence[Entry], grid: Grid, place: GridPlace, virtual: int = 0) -> tuple[Piece, ...]:
    """The pieces of one process's virtual stage, by the names of its own module. table: of `grid_entries`.

    Raises ValueError when a weight can't be cut evenly.
    """
    return tuple(_pieces(table, grid, place, virtual))


def _pieces(table: Sequence[Entry], grid: Grid, place: GridPlace, virtual: int) -> Iterator[Piece]:
    counts = [count for stages in grid.stages for count in stages]
    own_stage = virtual * grid.pipeline + place.pipeline
    each = (1 + max((entry.expert for entry in table if entry.expert is not None), default=-1)) // grid.expert
    for entry in table:
        stage, layer = where(entry, counts) if entry.part == "text" else (0, entry.layer)
        if stage != own_stage:
            continue
        if entry.expert is None:
            yield cut(entry, entry.local_name(layer), place.tensor, grid.tensor)
        elif entry.expert // each == place.expert:
            yield cut(entry, entry.local_name(layer, entry.expert % each), place.expert_tensor, grid.expert_tensor)


def read_pieces(source: Source, pieces: Sequence[Piece]) -> dict[str, Tensor]:
    """The tensors of `pieces` by their names; each Hugging Face tensor is read when its turn comes."""
    tensors = {}
    for piece in pieces:
        parts = [take(source[name], rows) for name, rows in zip(piece.entry.hf, piece.cuts, strict=True)]
        # A cut is a view of the whole tensor, which would stay in memory with it.
        tensors[piece.name] = join(piece.entry, parts).clone() if len(parts) == 1 else join(piece.entry, parts)
    return tensors
