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
    """A writer per name (a path without .bin or .idx). An error inside leaves what was there before; that of a disk is a ValueError."""
    try:
        with _all_or_nothing(names, type_code) as writers:
            yield writers
    except OSError as error:
        # An error of writing has no name of a file; one with another file's, as of the input, is not ours.
        if error.filename is None or any(Path(error.filename) in (*name.parents, *_parts(name, True)) for name in names):
            raise ValueError(f"output_prefix: {names[0].parent} can't be written to ({error.strerror or error})") from error
        raise


@contextmanager
def _all_or_nothing(names: Sequence[Path], type_code: int) -> Iterator[list[IndexedWriter]]:
    for name in names:
        _make_folder(name.parent)
    finals, temporary = ([path for name in names for path in _parts(name, unfinished)] for unfinished in (False, True))
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


def _parts(name: Path, unfinished: bool) -> list[Path]:
    """The two files of a column."""
    return [name.with_name(f".{name.name}{end}.{os.getpid()}" if unfinished else f"{name.name}{end}") for end in (".bin", ".idx")]


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
