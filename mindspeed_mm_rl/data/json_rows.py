"""Rows of JSON files: an object per line, or one array of objects."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mindspeed_mm_rl.data.rows import Columns, Rows, RowT, file_digest

JSON_SUFFIXES = (".jsonl", ".json")


def json_records(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, in order, blank lines left out; whether it is one array or lines is seen from its first character.

    Raises ValueError that names file and line.
    """
    if _is_array(file):
        yield from _array(file)
        return
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _object(line, file, number)


class JsonRows(Rows[RowT]):
    """Rows of one file; an array is kept in memory, of lines only where they begin. Safe to index from several threads.

    Raises ValueError at once for a file that holds no rows, or whose first row lacks columns.
    """

    def __init__(self, file: str | Path, columns: Columns[RowT]) -> None:
        file = Path(file).expanduser()
        self.files = (file,)
        self._columns = columns
        self._records = list(_array(file)) if _is_array(file) else None
        self._lines = _line_starts(file) if self._records is None else array("q")
        if len(self) == 0:
            raise ValueError(f"data file {file} has no rows")
        columns.check(f"{file}: its first row", self._record(0))

    def __len__(self) -> int:
        return len(self._lines) // 2 if self._records is None else len(self._records)

    def __getitem__(self, number: int) -> RowT:
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        return self._columns.row(self._record(number), self.files[0], number)

    def digests(self) -> dict[str, str]:
        return {file.name: file_digest(file) for file in self.files}

    def _record(self, number: int) -> dict[str, Any]:
        if self._records is not None:
            return self._records[number]
        start, line = self._lines[2 * number : 2 * number + 2]
        with self.files[0].open("rb") as stream:
            stream.seek(start)
            return _object(stream.readline(), self.files[0], line)


def _is_array(file: Path) -> bool:
    with file.open("rb") as stream:
        while block := stream.read(4096):
            if text := block.lstrip(b"\xef\xbb\xbf").strip():
                return text.startswith(b"[")
    return False


def _array(file: Path) -> Iterator[dict[str, Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error})") from error
    for number, record in enumerate(content):
        if not isinstance(record, dict):
            raise ValueError(f"{file}, row {number}: a row must be an object of column: value, not {type(record).__name__}")
        yield record


def _object(line: bytes, file: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file}, line {number}: not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{file}, line {number}: a row must be an object of column: value, not {type(record).__name__}")
    return record


def _line_starts(file: Path) -> array[int]:
    """Byte offset and line number (from 1) of each line that isn't blank, one after the other."""
    starts = array("q")
    offset = 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                starts.extend((offset, number))
            offset += len(line)
    return starts
