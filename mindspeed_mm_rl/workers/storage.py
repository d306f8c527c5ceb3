"""Folders of the driver's node on nodes that don't see them, where there is no shared storage.

save: an empty folder everywhere --ranks write their shards--> their node's --in parts, removed there--> the driver's node
load: the driver's node --what a node lacks, in parts--> every node --ranks read any shard--> removed where it was brought
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_mm_rl.workers.calls import Call, answers
from mindspeed_mm_rl.workers.failure import Member, WorkerFailed
from mindspeed_mm_rl.workers.worker import Worker

PART_BYTES = 64 << 20
"""What is in memory at a time, on either side."""
_FOLDER_MODE = 0o750


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by its path in it; {} for one that isn't there. Hidden folders are somebody else's."""
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {name.as_posix(): path.stat().st_size for name, path in found.items() if not any(p.startswith(".") for p in name.parts[:-1])}


class NodeDisk(Worker):
    """A process on another node that reads and writes there."""

    def __init__(self, root: str = "/") -> None:
        """root: what absolute paths begin at."""
        self.root = Path(root)

    def _path(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def sizes(self, folder: str) -> dict[str, int]:
        return file_sizes(self._path(folder))

    def holds(self, file: str) -> bool:
        return self._path(file).exists()

    def make(self, folder: str) -> None:
        self._path(folder).mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)

    def remove(self, folder: str) -> None:
        shutil.rmtree(self._path(folder), ignore_errors=True)

    def remove_files(self, files: Sequence[str]) -> None:
        for file in files:
            self._path(file).unlink(missing_ok=True)

    def read(self, file: str, start: int, num_bytes: int) -> np.ndarray:
        """uint8, fewer at the end of the file."""
        return np.fromfile(self._path(file), np.uint8, num_bytes, offset=start)

    def write(self, file: str, start: int, part: np.ndarray) -> None:
        """Parts come in order; the first one begins the file."""
        path = self._path(file)
        path.parent.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
        _write(path, start, part)


def _write(path: Path, start: int, part: np.ndarray) -> None:
    with path.open("ab" if start else "wb") as file:
        part.tofile(file)


class Storage:
    """Its verbs do nothing where every node sees what this one does. They raise as workers/calls.py says."""

    def __init__(self, disks: Sequence[Member] = (), timeout_seconds: float = 0.0) -> None:
        """disks: a NodeDisk of each node but the driver's."""
        self.disks, self.timeout = disks, timeout_seconds
        self.apart: list[Member] = []
        """Those whose ranks write saves that this node doesn't see."""
        self._brought: list[tuple[Member, list[str]]] = []

    @contextmanager
    def written(self, folder: str) -> Iterator[None]:
        """An empty folder everywhere, in which ranks of all nodes may write; afterwards it is here, with all that they wrote."""
        if not self.apart:
            yield
            return
        self._all("make", folder)
        try:
            yield
            for member in self.apart:
                for name in self._ask(member, "sizes", folder):
                    self._fetch(member, f"{folder}/{name}")
        except BaseException:
            with suppress(WorkerFailed):
                self._all("remove", folder)
            raise
        self._all("remove", folder)

    def bring(self, folder: str) -> None:
        """To every node what it lacks of a folder of this one."""
        for member in self.disks:
            files = [f"{folder}/{name}" for name in self.missing(member, folder)]
            self._brought.append((member, files))
            for file in files:
                self._send(member, file)

    def sees(self, member: Member, file: str) -> bool:
        return self._ask(member, "holds", file)

    def missing(self, member: Member, folder: str) -> list[str]:
        """Files of a folder of this node that another one has not, or of another size."""
        there = self._ask(member, "sizes", folder)
        return [name for name, size in sorted(file_sizes(Path(folder)).items()) if there.get(name) != size]

    def forget(self) -> None:
        """Removes what was brought, when nobody reads it any more."""
        brought, self._brought = self._brought, []
        for member, files in brought:
            self._ask(member, "remove_files", files)

    def _fetch(self, member: Member, file: str) -> None:
        path, start = Path(file), 0
        if path.exists():
            raise RuntimeError(f"{file} was written on two nodes, one of them {member.node}")
        while True:
            part = self._ask(member, "read", file, start, PART_BYTES)
            _write(path, start, part)
            start += len(part)
            if len(part) < PART_BYTES:
                return

    def _send(self, member: Member, file: str) -> None:
        start, size = 0, Path(file).stat().st_size
        while True:
            part = np.fromfile(file, np.uint8, PART_BYTES, offset=start)
            self._ask(member, "write", file, start, part)
            start += len(part)
            if start >= size:
                return

    def _all(self, verb: str, *arguments: Any) -> None:
        for member in self.apart:
            self._ask(member, verb, *arguments)

    def _ask(self, member: Member, verb: str, *arguments: Any) -> Any:
        return answers([Call(member, getattr(member.actor, verb).remote(*arguments))], self.timeout, f"storage of node {member.node}")[0]
