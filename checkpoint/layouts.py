"""Writing weight folders: all or nothing, under a temporary name until the last byte is on disk."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mindspeed_mm_rl.models.weight_files import INDEX_FILE, ITERATION_FILE, MODEL_FILE, RANK_FOLDER, RELEASE, SINGLE_FILE

CHECKPOINT_VERSION = 3.0
MAX_SHARD_BYTES = 5 * 10**9
_FOLDER_MODE = 0o750
_FILE_MODE = 0o640
_WEIGHT_ENDS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")


def check_target(target: Path) -> None:
    """Raises ValueError unless `target` is free to write: nothing that is there is ever replaced."""
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target} exists and is not empty; give a new folder or delete it first")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} exists and is a file; give a folder")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields a folder beside `target` that takes its name when the block ends well and is deleted otherwise."""
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".incomplete", dir=target.parent))
    try:
        yield work
        _settle(work)
        os.replace(work, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_mm(folder: Path, tensors: dict[str, Tensor]) -> None:
    """The MindSpeed-MM layout at tp 1, pp 1: `release/mp_rank_00/model_optim_rng.pt` and the text file that points to it."""
    rank = folder / RELEASE / RANK_FOLDER
    rank.mkdir(parents=True)
    torch.save(
        {"model": {name: _own(tensor) for name, tensor in tensors.items()}, "checkpoint_version": CHECKPOINT_VERSION}, rank / MODEL_FILE
    )
    (folder / ITERATION_FILE).write_text(RELEASE)


def write_safetensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """One model.safetensors, or numbered shards of at most max_shard_bytes with an index; holds one shard in memory at a time."""
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, max_shard_bytes):
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
        save_file(shard, folder / _part(len(shards)), metadata={"format": "pt"})
    if len(shards) == 1:
        (folder / _part(1)).rename(folder / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / _part(number)).rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")


def copy_side_files(source: Path, folder: Path) -> None:
    """Everything of a Hugging Face folder that is no weight: config, tokenizer, processor, chat template."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHT_ENDS):
            shutil.copyfile(path, folder / path.name)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _shards(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = _own(tensor)
        size += tensor.nbytes
    yield shard


def _own(tensor: Tensor) -> Tensor:
    """Files hold whole storages: a view of half of one would be written with the other half."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _part(number: int) -> str:
    return f"part-{number}.safetensors"


def _settle(folder: Path) -> None:
    """Modes and fsync, files before the folders that name them."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(root, name)
            path.chmod(_FILE_MODE)
            _sync(path)
        Path(root).chmod(_FOLDER_MODE)
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
