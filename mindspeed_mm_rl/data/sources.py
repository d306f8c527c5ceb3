"""Where training rows come from: parquet, JSON, or columns of prepared token ids. Parquet by number: exact random access, only the row
groups that are asked for, every complaint with file and row."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mindspeed_mm_rl.data.indexed import column_files
from mindspeed_mm_rl.data.json_rows import JSON_SUFFIXES, JsonRows
from mindspeed_mm_rl.data.rows import IMAGE_MARKER, Columns, Rows, RowT, file_digest

_CACHE_BYTES = 512 * 2**20
"""Row groups kept in memory: shuffled rows would otherwise decompress a whole group for each row."""


def open_rows(path: str | Path, columns: Columns[RowT], prepared: Callable[[Path], Rows[RowT]]) -> Rows[RowT]:
    """The rows of a file, of a folder (its train.parquet, shards, train.jsonl or train.json) or of a prefix of prepared columns.

    prepared: opens such a prefix. Raises ValueError for what no row can mend.
    """
    path = Path(path).expanduser()
    if not path.exists() and column_files(path):
        return prepared(path)
    if path.is_dir() and not any(path.glob("train*.parquet")):
        path = next((file for suffix in JSON_SUFFIXES if (file := path / f"train{suffix}").is_file()), path)
    if path.suffix in JSON_SUFFIXES and path.is_file():
        return JsonRows(path, columns)
    rows = ParquetRows(path, columns)
    rows.check_marked_images()
    return rows


def parquet_files(path: str | Path, split: str = "train") -> tuple[Path, ...]:
    """The file itself, or in a folder `<split>.parquet`, else its shards `<split>-*-of-*.parquet`; ValueError when there are none."""
    path = Path(path).expanduser()
    if path.is_file():
        return (path,)
    if not path.is_dir():
        raise ValueError(
            f"data file {path} does not exist, and no {path.name}_packed_*_document.idx beside it:"
            " make it with examples/rl/data_preprocess, or correct the path in megatron_training.data_path or eval.data_path"
        )
    if (whole := path / f"{split}.parquet").is_file():
        return (whole,)
    if shards := tuple(sorted(path.glob(f"{split}-*-of-*.parquet"))):
        return shards
    raise ValueError(f"data folder {path} holds neither {split}.parquet nor {split}-*-of-*.parquet nor {split}.jsonl nor {split}.json")


class ParquetRows(Rows[RowT]):
    """All rows of the files of `path`, numbered through; safe to index from several threads.

    Raises ValueError at once for what no row can mend: no file, no parquet, columns that are missing, images of a wrong type.
    """

    def __init__(self, path: str | Path, columns: Columns[RowT]) -> None:
        self.files = parquet_files(path)
        self._columns = columns
        self._readers = [_open(file) for file in self.files]
        for file, reader in zip(self.files, self._readers, strict=True):
            columns.check(str(file), reader.schema_arrow.names)
            _check_images(file, reader.schema_arrow, columns.image_key)
        # (file, row group) of each group and the number of its first row, over all files.
        self._groups = [(f, g) for f, reader in enumerate(self._readers) for g in range(reader.num_row_groups)]
        sizes = [self._readers[f].metadata.row_group(g).num_rows for f, g in self._groups]
        self._first_rows = [0, *accumulate(sizes)]
        self._first_of_file = [0, *accumulate(reader.metadata.num_rows for reader in self._readers)]
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = threading.Lock()
        if len(self) == 0:
            raise ValueError(f"data file {self.files[0]} has no rows")

    def __len__(self) -> int:
        return self._first_rows[-1]

    def __getitem__(self, number: int) -> RowT:
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        group = bisect_right(self._first_rows, number) - 1
        table = self._group(group)
        record = table.slice(number - self._first_rows[group], 1).to_pylist()[0]
        file = self.files[self._groups[group][0]]
        return self._columns.row(record, file, number - self._first_of_file[self._groups[group][0]])

    def check_marked_images(self) -> None:
        """Raises ValueError when prompts mark pictures and their file has no column for them. Reads the prompts of such files alone."""
        prompt_key, image_key = self._columns.prompt_key, self._columns.image_key
        for file, reader in zip(self.files, self._readers, strict=True):
            if image_key in reader.schema_arrow.names or prompt_key not in reader.schema_arrow.names:
                continue
            for number, prompt in enumerate(reader.read(columns=[prompt_key])[prompt_key].to_pylist()):
                if IMAGE_MARKER in str(prompt):
                    raise ValueError(f"{file} has no column '{image_key}', but its prompts have {IMAGE_MARKER} markers (row {number})")

    def digests(self) -> dict[str, str]:
        return {file.name: file_digest(file) for file in self.files}

    def _group(self, group: int) -> pa.Table:
        with self._lock:
            if group in self._cache:
                self._cache.move_to_end(group)
                return self._cache[group]
            file, row_group = self._groups[group]
            reader = self._readers[file]
            columns = [name for name in self._columns.names if name in reader.schema_arrow.names]
            try:
                table = reader.read_row_group(row_group, columns=columns)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{self.files[file]}: row group {row_group} can't be read ({error})") from error
            self._cache[group] = table
            while len(self._cache) > 1 and sum(kept.nbytes for kept in self._cache.values()) > _CACHE_BYTES:
                self._cache.popitem(last=False)
            return table


def _open(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        kinds = "" if file.suffix == ".parquet" else f"; rows come from .parquet, {' and '.join(JSON_SUFFIXES)} files"
        raise ValueError(f"{file} is not a readable parquet file ({error}){kinds}") from error


def _check_images(file: Path, schema: pa.Schema, image_key: str) -> None:
    if image_key in schema.names and not _holds_images(schema.field(image_key).type):
        raise ValueError(f"{file}: column '{image_key}' must be a list of {{bytes, path}}, not {schema.field(image_key).type}")


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return pa.types.is_null(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)
