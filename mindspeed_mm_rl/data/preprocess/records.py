"""The records of a data set, one after the other, each with the place it stands at. Nothing is kept in memory but what is being read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mindspeed_mm_rl.data.json_rows import JSON_SUFFIXES, json_records

_SUFFIXES = (*JSON_SUFFIXES, ".parquet")
_ROWS_AT_A_TIME = 256

Record = dict[str, Any]


def input_files(given: str) -> tuple[Path, ...]:
    """The file, or the files of a folder in the order of their names. Raises ValueError when they can't be read here."""
    path = Path(given).expanduser()
    if not path.exists():
        raise ValueError(f"input: {given} doesn't exist; a data set of the hub is downloaded first, then its files are given")
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise ValueError(f"input: {given} isn't offered; files end in {', '.join(_SUFFIXES)}")
        return (path,)
    files = tuple(sorted(file for file in path.iterdir() if file.is_file() and file.suffix in _SUFFIXES and file.name[0] != "."))
    kinds = {file.suffix for file in files}
    if not files or len(kinds) > 1:
        found = f"a mixture of {', '.join(sorted(kinds))} files" if files else f"no {', '.join(_SUFFIXES)} file"
        raise ValueError(f"input: folder {given} holds {found}; give one file, or a folder with files of one kind")
    return files


def read_records(files: tuple[Path, ...]) -> Iterator[tuple[str, Record]]:
    """(file and row number, record) in order. Raises ValueError that names the file which can't be read."""
    for file in files:
        for number, record in enumerate(_parquet_records(file) if file.suffix == ".parquet" else json_records(file)):
            yield f"{file}, row {number}", record


def count_records(files: tuple[Path, ...]) -> int | None:
    """Records of parquet files, lines of .jsonl files; None where only reading everything would tell."""
    kinds = {file.suffix for file in files}
    if kinds == {".parquet"}:
        return sum(pq.read_metadata(file).num_rows for file in files)
    return sum(_lines(file) for file in files) if kinds == {".jsonl"} else None


def _lines(file: Path) -> int:
    with file.open("rb") as stream:
        return sum(1 for line in stream if line.strip())


def _parquet_records(file: Path) -> Iterator[Record]:
    try:
        with pq.ParquetFile(file) as reader:
            for batch in reader.iter_batches(_ROWS_AT_A_TIME):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a readable parquet file ({error})") from error
