"""Column files that appear whole or not at all: written under temporary names, synced, renamed together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mindspeed_mm_rl.data.indexed import IndexedWriter

_FOLDER_MODE, _FILE_MODE = 0o750, 0o640


@contextmanager
def new_columns(names: Sequence[Path], type_code: int = 4) -> Iterator[list[IndexedWriter]]:
    """A writer per name (a path without .bin or .idx). An error inside leaves what was there before."""
    for name in names:
        _make_folder(name.parent)
    finals = [name.with_name(f"{name.name}{suffix}") for name in names for suffix in (".bin", ".idx")]
    temporary = [final.with_name(f".{final.name}.{os.getpid()}") for final in finals]
    writers: list[IndexedWriter] = []
    try:
        for content, index in zip(temporary[::2], temporary[1::2], strict=True):
            writers.append(IndexedWriter(content, index, type_code))
        yield writers
        for writer in writers:
            writer.finish()
        for path, final in zip(temporary, finals, strict=True):
            path.chmod(_FILE_MODE)
            path.replace(final)
        _sync_folders({final.parent for final in finals})
    finally:
        for writer in writers:
            writer.abandon()
        for path in temporary:
            path.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    if not folder.exists():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        folder.chmod(_FOLDER_MODE)


def _sync_folders(folders: set[Path]) -> None:
    for folder in folders:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
