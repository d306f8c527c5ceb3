"""Files of ranks out of a source: each rank's pieces are cut and joined when their turn comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoint.tensor_files import Pending
from checkpoint.torch_writer import TorchFile
from mindspeed_mm_rl.models.name_rules import Part
from mindspeed_mm_rl.models.placement import Layout, Piece, placement
from mindspeed_mm_rl.models.rank_files import MODEL_FILE, spoken_entries, take
from mindspeed_mm_rl.models.weight_files import ITERATION_FILE, RELEASE
from mindspeed_mm_rl.models.weight_layout import parts_in_order
from mindspeed_mm_rl.models.weight_sources import Source

CHECKPOINT_VERSION = 3.0
_ITERATION = 1

Watch = Callable[[str, Tensor], Tensor]
"""Sees every tensor before it is written, and may refuse it."""


def rank_files(
    folder: Path, source: Source, layout: Layout, config: Mapping[str, Any], parts: Sequence[Part], watch: Watch
) -> Iterator[TorchFile]:
    """Every rank's file. MindSpeed-LLM's files say iteration 1, MindSpeed-MM's say release."""
    release = layout.dialect.prefix
    name = RELEASE if release else f"iter_{_ITERATION:07d}"
    others = {"checkpoint_version": CHECKPOINT_VERSION} | ({} if release else {"iteration": _ITERATION})
    for file in placement(spoken_entries(config, layout, parts), layout):
        models = {key: [pending(piece, source, watch) for piece in pieces] for key, pieces in file.models.items()}
        yield TorchFile(folder / name / file.folder / MODEL_FILE, models, others)


def point_to(folder: Path, layout: Layout) -> None:
    (folder / ITERATION_FILE).write_text(RELEASE if layout.dialect.prefix else str(_ITERATION))


def pending(piece: Piece, source: Source, watch: Watch) -> Pending:
    """A rank's piece, to be cut and joined. Raises ValueError when what it joins is of several types."""
    dtypes = {name: source.dtype(name) for name in piece.entry.hf}
    if len(set(dtypes.values())) > 1:
        raise ValueError(f"{piece.name} would join weights of several types: {dtypes}; store the model in one type")
    return Pending(piece.name, piece.entry.mm_shape, next(iter(dtypes.values())), lambda: _parts(piece, source, watch))


def _parts(piece: Piece, source: Source, watch: Watch) -> Iterator[Tensor]:
    cut = [take(source[name], where) for name, where in zip(piece.entry.hf, piece.cuts, strict=True)]
    for part in parts_in_order(piece.entry, cut):
        yield watch(piece.name, part)
