"""Files of ranks out of a source: each rank's pieces are cut and joined when their turn comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoint.sources import Source
from checkpoint.torch_writer import Pending, write_torch_file
from checkpoint.work import Job
from mindspeed_mm_rl.models.name_rules import Part
from mindspeed_mm_rl.models.placement import Layout, Piece, RankFile, placement
from mindspeed_mm_rl.models.rank_files import MODEL_FILE, spoken_entries, take
from mindspeed_mm_rl.models.weight_files import ITERATION_FILE, RELEASE
from mindspeed_mm_rl.models.weight_layout import join

CHECKPOINT_VERSION = 3.0
_ITERATION = 1

Watch = Callable[[str, Tensor], Tensor]
"""Sees every tensor before it is written, and may refuse it."""


def rank_jobs(
    folder: Path, source: Source, layout: Layout, config: Mapping[str, Any], parts: Sequence[Part], watch: Watch
) -> Iterator[Job]:
    """One job for every rank's file. MindSpeed-LLM's files say iteration 1, MindSpeed-MM's say release."""
    release = layout.dialect.prefix
    name = RELEASE if release else f"iter_{_ITERATION:07d}"
    others = {"checkpoint_version": CHECKPOINT_VERSION} | ({} if release else {"iteration": _ITERATION})
    for file in placement(spoken_entries(config, layout, parts), layout):
        models = {key: [pending(piece, source, watch) for piece in pieces] for key, pieces in file.models.items()}
        yield Job(
            str(Path(name, file.folder, MODEL_FILE)),
            sum(tensor.nbytes for tensors in models.values() for tensor in tensors),
            lambda file=file, models=models: _write(folder / name, file, models, others),
        )


def point_to(folder: Path, layout: Layout) -> None:
    (folder / ITERATION_FILE).write_text(RELEASE if layout.dialect.prefix else str(_ITERATION))


def _write(folder: Path, file: RankFile, models: Mapping[str, Sequence[Pending]], others: Mapping[str, Any]) -> None:
    rank = folder / file.folder
    rank.mkdir(parents=True)
    write_torch_file(rank / MODEL_FILE, models, others)


def pending(piece: Piece, source: Source, watch: Watch) -> Pending:
    """A rank's piece, to be cut and joined. Raises ValueError when what it joins is of several types."""
    dtypes = {name: source.dtype(name) for name in piece.entry.hf}
    if len(set(dtypes.values())) > 1:
        raise ValueError(f"{piece.name} would join weights of several types: {dtypes}; store the model in one type")
    return Pending(piece.name, piece.entry.mm_shape, next(iter(dtypes.values())), lambda: watch(piece.name, _make(piece, source)))


def _make(piece: Piece, source: Source) -> Tensor:
    return join(piece.entry, [take(source[name], cut) for name, cut in zip(piece.entry.hf, piece.cuts, strict=True)])
