"""Writing weight folders: all or nothing, under a temporary name until the last byte is on disk."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FOLDER_MODE = 0o750
_FILE_MODE = 0o640
_WEIGHT_ENDS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")


def check_target(target: Path) -> None:
    """Raises ValueError unless `target` is free to write: nothing that is there is ever replaced."""
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target} exists and is not empty; give a new folder or delete it first")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} exists and is a file; give a folder")
    for parent in target.parents:
        if parent.exists() and not parent.is_dir():
            raise ValueError(f"{parent} is a file, so that {target} can't be made; give another folder")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields a folder beside `target` that takes its name when the block ends well and is deleted otherwise.

    What a killed process left under that temporary name is deleted; a living one holds a lock on it, and then ValueError is raised.
    """
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.incomplete"
    work.mkdir(exist_ok=True)
    with _lock(work):
        try:
            _empty(work)
            yield work
            _settle(work)
            check_target(target)
            os.replace(work, target)
            _sync(target.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ValueError(f"another mm-convert is writing {folder}; wait for it or give another folder") from error
    try:
        yield
    finally:
        os.close(descriptor)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def copy_side_files(source: Path, folder: Path) -> None:
    """Everything of a Hugging Face folder that is no weight: config, tokenizer, processor, chat template."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHT_ENDS):
            shutil.copyfile(path, folder / path.name)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


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
