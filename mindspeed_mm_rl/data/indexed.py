"""Columns of token ids in the files of megatron's IndexedDataset, and the training rows that prepared columns make.

`<prefix>_packed_<column>_document.bin` holds the ids one sequence after the other, `.idx` (little endian):

    9 bytes "MMIDIDX\\0\\0" | u64 version 1 | u8 type | u64 sequences S | u64 documents D
    int32 lengths [S] | int64 byte offsets [S] | int64 first sequence of each document and S at the end [D]

megatron has a builder and a reader of its own; they need megatron and torch, and the preparation of data shouldn't.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from mindspeed_mm_rl.data.rows import Row, Rows, file_digest

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_INT32 = 4
_COPY_BYTES = 2**24
PROMPT_COLUMN, ANSWER_COLUMN, SOURCE_COLUMN = "input_ids", "labels", "data_source"
_MASKS = ("attention_mask", "position_ids")


def column_name(prefix: str | Path, column: str) -> str:
    """The path of a column without .bin or .idx. Example: column_name("data/math", "labels") == "data/math_packed_labels_document"."""
    return f"{prefix}_packed_{column}_document"


def column_files(prefix: str | Path) -> dict[str, Path]:
    """Column -> its .idx file, for every column that `prefix` has."""
    prefix = Path(prefix)
    head, tail = f"{prefix.name}_packed_", "_document.idx"
    if not prefix.parent.is_dir():
        return {}
    names = sorted(path for path in prefix.parent.iterdir() if path.name.startswith(head) and path.name.endswith(tail))
    return {path.name[len(head) : -len(tail)]: path for path in names}


class IndexedColumn:
    """One column, read through memory maps: sequence i as an array of ids; safe to index from several threads.

    Raises ValueError, with the file and what is wrong, when the two files don't fit each other.
    """

    def __init__(self, path: str | Path) -> None:
        """path: without .bin or .idx."""
        self.files = Path(f"{path}.idx"), Path(f"{path}.bin")
        for file in self.files:
            if not file.is_file():
                raise ValueError(f"{file} does not exist: a column is a .bin and a .idx file")
        index, content = self.files
        self._type, sequences, documents = _header(index)
        sizes = 4 * sequences, 8 * sequences, 8 * documents
        # The modes of multimodal files (one byte per sequence) may follow.
        if index.stat().st_size - _HEADER.size - sum(sizes) not in (0, sequences):
            raise ValueError(f"{index} is damaged: {index.stat().st_size} bytes don't fit {sequences} sequences in {documents} documents")
        bytes_ = np.memmap(index, np.uint8, "r")[_HEADER.size :]
        self.lengths: np.ndarray = bytes_[: sizes[0]].view("<i4")
        self._offsets = bytes_[sizes[0] : sizes[0] + sizes[1]].view("<i8")
        end = int((self._offsets + self.lengths.astype(np.int64) * self._type.itemsize).max(initial=0))
        if content.stat().st_size != end:
            raise ValueError(f"{content} doesn't belong to {index.name}: it has {content.stat().st_size} bytes, not {end}")
        # An empty file can't be mapped.
        self._content: np.ndarray = np.memmap(content, np.uint8, "r") if end else np.empty(0, np.uint8)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> np.ndarray:
        start = int(self._offsets[number])
        return self._content[start : start + int(self.lengths[number]) * self._type.itemsize].view(self._type)

    @property
    def type_code(self) -> int:
        return next(code for code, name in _TYPES.items() if np.dtype(name) == self._type)


def _header(index: Path) -> tuple[np.dtype, int, int]:
    with index.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise ValueError(f"{index} is no index of an IndexedDataset: it doesn't begin with MMIDIDX")
    _, version, code, sequences, documents = _HEADER.unpack(header)
    if version != 1 or code not in _TYPES:
        raise ValueError(f"{index} has version {version} and type {code}; version 1 and types 1 to {max(_TYPES)} can be read")
    return np.dtype(_TYPES[code]), sequences, documents


class IndexedWriter:
    """Writes one column as megatron's IndexedDatasetBuilder does, byte for byte; every sequence is a document of its own.

    Nothing is complete before `finish`, which writes the index and syncs both files.
    """

    def __init__(self, bin_file: Path, idx_file: Path, type_code: int = _INT32) -> None:
        """type_code: int32 by default, which holds the -100 of labels that aren't trained on."""
        self._idx_file, self._code, self._type = idx_file, type_code, np.dtype(_TYPES[type_code])
        self._lengths: list[int] = []
        self._stream = bin_file.open("wb")

    def add(self, token_ids: Sequence[int]) -> None:
        self._stream.write(np.asarray(token_ids, self._type).tobytes())
        self._lengths.append(len(token_ids))

    def add_column(self, column: IndexedColumn) -> None:
        """Every sequence of a column of the same type, without decoding it."""
        self._lengths.extend(map(int, column.lengths))
        with column.files[1].open("rb") as stream:
            shutil.copyfileobj(stream, self._stream, _COPY_BYTES)

    def finish(self) -> None:
        lengths = np.asarray(self._lengths, "<i4")
        offsets = np.cumsum(lengths, dtype="<i8") * self._type.itemsize - lengths * np.int64(self._type.itemsize)
        documents = np.arange(len(lengths) + 1, dtype="<i8")
        with self._idx_file.open("wb") as stream:
            stream.write(_HEADER.pack(_MAGIC, 1, self._code, len(lengths), len(documents)))
            for part in (lengths, offsets.astype("<i8"), documents):
                stream.write(part.tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()

    def abandon(self) -> None:
        # Closing writes what is still held back, for which a full disk has no room.
        with suppress(OSError):
            self._stream.close()


def open_columns(prefix: Path, names: Iterable[str]) -> dict[str, IndexedColumn]:
    """Raises ValueError when these columns of a prefix are damaged, differ in rows or have none."""
    columns = {name: IndexedColumn(column_name(prefix, name)) for name in names}
    counts = {name: len(column) for name, column in columns.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"the columns of {prefix} differ in rows ({counts}): they aren't of one preparation")
    if not all(counts.values()):
        raise ValueError(f"the columns of {prefix} have no rows")
    return columns


class IndexedRows(Rows[Row]):
    """Training rows of the columns of a prefix: input_ids are prompts as they are, labels the answers as token ids.

    Raises ValueError at once for missing or damaged files, and for columns of supervised or preference data.
    """

    def __init__(self, prefix: str | Path, decode: Callable[[Sequence[int]], str]) -> None:
        self._prefix, self._decode = Path(prefix), decode
        found = column_files(prefix)
        _check_names(self._prefix, found)
        self._columns = open_columns(self._prefix, [name for name in found if name not in _MASKS])
        self.files: tuple[Path, ...] = tuple(file for column in self._columns.values() for file in column.files)

    def __len__(self) -> int:
        return len(self._columns[PROMPT_COLUMN])

    def __getitem__(self, number: int) -> Row:
        """Raises ValueError that names files and row when the answer is empty or masked."""
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        where = f"{column_name(self._prefix, '*')}, row {number}"
        texts = {name: self._text(column[number], name, where) for name, column in self._columns.items() if name != PROMPT_COLUMN}
        if not texts[ANSWER_COLUMN].strip():
            raise ValueError(f"{where}: the answer (labels) is empty")
        extra = {name: text for name, text in texts.items() if name not in (ANSWER_COLUMN, SOURCE_COLUMN)}
        token_ids = tuple(self._columns[PROMPT_COLUMN][number].tolist())
        return Row(where, (), (), texts[ANSWER_COLUMN], texts.get(SOURCE_COLUMN, ""), extra, token_ids)

    def digests(self) -> dict[str, str]:
        return {file.name: file_digest(file) for file in self.files}

    def _text(self, token_ids: np.ndarray, column: str, where: str) -> str:
        if len(token_ids) and int(token_ids.min()) < 0:
            raise ValueError(
                f"{where}: column {column} has masked ids ({int(token_ids.min())}), as supervised data have;"
                " prepare prompts for reinforcement learning with R1AlpacaStyleInstructionHandler"
            )
        return self._decode(token_ids.tolist())


def _check_names(prefix: Path, found: Iterable[str]) -> None:
    columns = ", ".join(found)
    if "chosen_input_ids" in found:
        raise ValueError(f"{prefix} holds preference pairs ({columns}); this training draws prompts (columns input_ids and labels)")
    if missing := [name for name in (PROMPT_COLUMN, ANSWER_COLUMN) if name not in found]:
        raise ValueError(
            f"{prefix} has the columns {columns} but not {', '.join(missing)}; prepare it with dataset_additional_keys: [labels]"
        )
