"""Geometry3K (schema of hiyouga/geometry3k: images, problem, answer) to the rows that training reads.

python examples/rl/data_preprocess/geo3k.py --local_dir ~/data/geo3k                         downloads the data set
python examples/rl/data_preprocess/geo3k.py --local_dir ~/data/geo3k --local_data FOLDER     takes parquet files that are already here

Writes train.parquet and test.parquet with the columns data_source, prompt, images, ability, reward_model, extra_info.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

DATA_SOURCE = "hiyouga/geometry3k"
INSTRUCTION = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. "
    "The reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \\boxed{}."
)
MARKER = "<image>"
SOURCE_COLUMNS = ("images", "problem", "answer")
SPLIT_NAMES = {"train": ("train",), "test": ("test", "validation")}
"""A split is made from the first of these names that there is a file for."""
ROWS_PER_GROUP = 64
"""Small row groups: training reads rows in random order, and each costs the decompression of its group."""
HUB_SECONDS = 40.0
"""A hub that has not answered by then counts as unreachable."""

_SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        (
            "extra_info",
            pa.struct([("split", pa.string()), ("index", pa.int64()), ("answer", pa.string()), ("question", pa.string())]),
        ),
    ]
)


@dataclass(frozen=True)
class Source:
    """The rows one split is made from. Example: Source("geometry3k/train.parquet", 500, read_tables)."""

    name: str
    """For messages to people."""
    rows: int
    tables: Callable[[], Iterator[pa.Table]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Makes the training rows of Geometry3K.")
    parser.add_argument("--local_dir", default="~/data/geo3k", help="where train.parquet and test.parquet are written (~/data/geo3k)")
    parser.add_argument("--local_data", nargs="+", help=f"folder or parquet files of {DATA_SOURCE}; without it they are downloaded")
    options = parser.parse_args(arguments)
    # New files are 640 and folders 750; a stricter umask stays.
    os.umask(os.umask(0o077) | 0o027)
    try:
        sources = local_sources([Path(path).expanduser() for path in options.local_data]) if options.local_data else hub_sources()
        write_splits(sources, Path(options.local_dir).expanduser())
    except (ValueError, OSError) as error:
        print(f"geo3k.py: {error}", file=sys.stderr)
        return 2
    return 0


def local_sources(paths: Sequence[Path]) -> dict[str, Source]:
    """Split -> its rows, from one folder (or its subfolder data) or from files. Raises ValueError when there are no training rows."""
    if missing := [str(path) for path in paths if not path.exists()]:
        raise ValueError(f"--local_data: {', '.join(missing)} does not exist")
    if len(paths) == 1 and paths[0].is_dir():
        files = {split: _files_in(paths[0], names) for split, names in SPLIT_NAMES.items()}
    elif folders := [str(path) for path in paths if path.is_dir()]:
        raise ValueError(f"--local_data takes one folder or several files, not a folder among others ({', '.join(folders)})")
    else:
        files = _files_by_name(paths)
    if not files["train"]:
        given = ", ".join(map(str, paths))
        raise ValueError(f"--local_data: no training rows in {given}: expected train.parquet, train-*.parquet or train_*.parquet")
    return {split: _file_source(found) for split, found in files.items() if found}


def _files_in(folder: Path, names: Sequence[str]) -> list[Path]:
    for name in names:
        for place in (folder, folder / "data"):
            if (exact := place / f"{name}.parquet").is_file():
                return [exact]
            if candidates := sorted([*place.glob(f"{name}-*.parquet"), *place.glob(f"{name}_*.parquet")]):
                return _one_or_all_shards(name, candidates)
    return []


def _one_or_all_shards(name: str, candidates: list[Path]) -> list[Path]:
    shards = [re.fullmatch(r"(.+)-(\d+)-of-(\d+)", path.stem) for path in candidates]
    if len(candidates) == 1 and shards[0] is None:
        return candidates
    found = ", ".join(path.name for path in candidates)
    if not all(shards) or len({(shard[1], shard[3]) for shard in shards}) > 1:
        raise ValueError(
            f"{candidates[0].parent} holds several files for the split {name} ({found}): rename the right one to {name}.parquet,"
            " or pass files instead of the folder"
        )
    if len(candidates) != int(shards[0][3]):
        raise ValueError(f"{candidates[0].parent} holds {len(candidates)} of {int(shards[0][3])} shards of the split {name} ({found})")
    return candidates


def _files_by_name(paths: Sequence[Path]) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {split: [] for split in SPLIT_NAMES}
    for path in paths:
        split = next((split for split, names in SPLIT_NAMES.items() if path.name.startswith(names)), None)
        if split is None and len(paths) > 1:
            raise ValueError(f"--local_data: the name of {path} must begin with train, test or validation to tell its split")
        files[split or "train"].append(path)
    return files


def _file_source(files: Sequence[Path]) -> Source:
    readers = [_open(file) for file in files]

    def tables() -> Iterator[pa.Table]:
        for reader in readers:
            for batch in reader.iter_batches(batch_size=ROWS_PER_GROUP, columns=list(SOURCE_COLUMNS)):
                yield pa.Table.from_batches([batch])

    return Source(", ".join(map(str, files)), sum(reader.metadata.num_rows for reader in readers), tables)


def _open(file: Path) -> pq.ParquetFile:
    try:
        reader = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a readable parquet file ({error})") from error
    if missing := [name for name in SOURCE_COLUMNS if name not in reader.schema_arrow.names]:
        raise ValueError(f"{file} lacks the column {', '.join(missing)}; it has {', '.join(reader.schema_arrow.names)}")
    kind = reader.schema_arrow.field("images").type
    if not (pa.types.is_null(kind) or pa.types.is_list(kind) and pa.types.is_struct(kind.value_type)):
        raise ValueError(f"{file}: column images must be a list of {{bytes, path}}, not {kind}")
    return reader


def hub_sources() -> dict[str, Source]:
    """The data set from the Hugging Face hub, or its cache; ValueError within a minute when neither can be had."""
    dataset = _download()
    sources = {}
    for split, names in SPLIT_NAMES.items():
        if name := next((name for name in names if name in dataset), None):
            sources[split] = _hub_source(dataset[name], name)
    return sources


def _hub_source(rows: Any, name: str) -> Source:
    from datasets import Image, Sequence

    encoded = rows.cast_column("images", Sequence(Image(decode=False))).with_format("arrow")
    return Source(f"{DATA_SOURCE} ({name})", len(rows), lambda: encoded.iter(batch_size=ROWS_PER_GROUP))


def _download() -> Any:
    """load_dataset in a thread beside a probe of the hub: a download may take long, but only once the hub has answered."""
    print(f"downloading {DATA_SOURCE} ...", flush=True)
    logging.disable(logging.WARNING)
    outcome: list[Any] = []
    unanswered: list[Exception] = []
    reachable, finished = threading.Event(), threading.Event()

    def load() -> None:
        try:
            from datasets import load_dataset

            outcome.append(load_dataset(DATA_SOURCE))
        except Exception as error:  # noqa: BLE001 - it crosses to the main thread, which raises it
            outcome.append(error)
        finished.set()

    def probe() -> None:
        try:
            from huggingface_hub import HfApi

            HfApi().dataset_info(DATA_SOURCE, timeout=HUB_SECONDS)
            reachable.set()
        except Exception as error:  # noqa: BLE001 - any failure means the same: not reachable
            unanswered.append(error)

    for target in (load, probe):
        threading.Thread(target=target, daemon=True).start()
    if not finished.wait(HUB_SECONDS) and not reachable.is_set():
        raise ValueError(_no_hub(f"no answer from the hub within {HUB_SECONDS:.0f} s", *unanswered))
    finished.wait()
    if isinstance(outcome[0], Exception):
        raise ValueError(_no_hub(*outcome))
    return outcome[0]


def _no_hub(*reasons: str | Exception) -> str:
    first_lines = "; ".join(str(reason).partition("\n")[0] for reason in reasons)
    return f"can't download {DATA_SOURCE} ({first_lines}): without network, pass its parquet files with --local_data FOLDER"


def write_splits(sources: dict[str, Source], folder: Path) -> None:
    """Writes every split under a temporary name, then renames them all: an error leaves what was there before."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {split: folder / f".{split}.parquet.{os.getpid()}" for split in sources}
    try:
        for split, source in sources.items():
            _write(source, split, temporary[split])
        for split, path in temporary.items():
            path.replace(folder / f"{split}.parquet")
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    _sync(folder)
    for split, source in sources.items():
        print(f"{folder / split}.parquet: {source.rows} rows from {source.name}")
    for split in SPLIT_NAMES.keys() - sources.keys():
        print(f"no {split} split found: {folder / split}.parquet was not written", file=sys.stderr)


def _write(source: Source, split: str, path: Path) -> None:
    index = 0
    with pq.ParquetWriter(path, _SCHEMA.with_metadata(_features())) as writer, tqdm(total=source.rows, desc=split, unit="row") as bar:
        for table in source.tables():
            rows = [make_row(record, split, index + i, f"{source.name}, row {index + i}") for i, record in enumerate(table.to_pylist())]
            writer.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
            index += len(rows)
            bar.update(len(rows))
    _sync(path)


def make_row(record: dict[str, Any], split: str, index: int, where: str) -> dict[str, Any]:
    """One training row; ValueError that names `where` for a missing answer or pictures that do not fit their markers."""
    problem, answer, images = record["problem"], record["answer"], record["images"] or []
    if not problem:
        raise ValueError(f"{where}: the problem is missing")
    if answer is None or not str(answer).strip():
        raise ValueError(f"{where}: the answer is missing")
    if problem.count(MARKER) != len(images):
        raise ValueError(f"{where}: the problem has {problem.count(MARKER)} {MARKER} markers but {len(images)} images")
    if not all(image and image["bytes"] for image in images):
        raise ValueError(f"{where}: an image has no bytes")
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": f"{problem} {INSTRUCTION}"}],
        "images": images,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(answer)},
        "extra_info": {"split": split, "index": index, "answer": str(answer), "question": problem},
    }


def _features() -> dict[str, str]:
    """What makes `datasets.load_dataset` decode the images column; plain lists are read by its old and new versions."""

    def features(kind: pa.DataType) -> Any:
        if pa.types.is_list(kind):
            return [features(kind.value_type)]
        if pa.types.is_struct(kind):
            if kind.get_field_index("bytes") >= 0:
                return {"_type": "Image"}
            return {field.name: features(field.type) for field in kind}
        return {"dtype": str(kind), "_type": "Value"}

    return {"huggingface": json.dumps({"info": {"features": {field.name: features(field.type) for field in _SCHEMA}}})}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: it would wait for the threads of a download that never answers.
    os._exit(status)
