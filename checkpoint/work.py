"""Tensors of many files written several at a time, with one bar over the bytes of all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from shutil import disk_usage
from threading import Event, Lock

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from checkpoint.tensor_files import TensorFile, create, put, read_ahead
from mindspeed_mm_rl.models.weight_sources import sound


class Stopped(Exception):
    """Another tensor failed first."""


class Work:
    """`watch` is what every tensor passes through before it is written."""

    def __init__(self, title: str, workers: int = 1) -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}; it must be at least 1")
        self.workers = workers
        self._stop = Event()
        columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task(title)

    def watch(self, name: str, tensor: Tensor) -> Tensor:
        """Asks for its pages, counts the bytes, refuses NaN."""
        if self._stop.is_set():
            raise Stopped
        self._progress.advance(self._task, tensor.nbytes)
        read_ahead(tensor)
        return sound(name, tensor)

    @contextmanager
    def shown(self, total: int) -> Iterator[None]:
        """Shows the bar while so many bytes pass."""
        self._progress.update(self._task, total=total)
        with self._progress:
            yield

    def write(self, files: Sequence[TensorFile]) -> None:
        """Writes all files, `workers` tensors at a time. Raises what the first tensor that fails raises; ValueError: no room."""
        opened = [_Opened(file) for file in files]
        total = sum(tensor.nbytes for file in files for tensor in file.tensors)
        _check_room(files[0].path.parent, total)
        with self.shown(total), ThreadPoolExecutor(self.workers) as pool, self._stopping():
            futures = [pool.submit(self._unless_stopped, step) for file in opened for step in file.steps()]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            if any(future.exception() for future in done):
                self._stop.set()
        # Not before all threads are done: a number that is closed may be another file's a moment later.
        for file in opened:
            file.close()
        for future in sorted(done, key=lambda future: isinstance(future.exception(), Stopped)):
            future.result()

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """An interrupt ends the threads too."""
        try:
            yield
        except BaseException:
            self._stop.set()
            raise

    def _unless_stopped(self, step: Callable[[], None]) -> None:
        if self._stop.is_set():
            raise Stopped
        step()


def _check_room(folder: Path, needed: int) -> None:
    """folder: need not be there yet. A large model would fill the disk for minutes before it failed."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if (free := disk_usage(place).free) < needed:
        raise ValueError(f"{place.parent} has room for {decimal(free)}, but {decimal(needed)} are to be written; make room there")


class _Opened:
    """One file among several threads: opened by its first tensor, ended and closed by its last."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self._left = len(file.tensors)
        self._lock = Lock()
        self._descriptor: int | None = None

    def steps(self) -> list[Callable[[], None]]:
        """One for each tensor; a file without any is a step too."""
        return [lambda index=index: self._put(index) for index in range(self._left)] or [self._write_empty]

    def _put(self, index: int) -> None:
        descriptor = self._open()
        put(self._file, index, descriptor)
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._file.end(descriptor)
            self.close()

    def _write_empty(self) -> None:
        self._file.end(self._open())
        self.close()

    def _open(self) -> int:
        with self._lock:
            if self._descriptor is None:
                self._descriptor = create(self._file)
                self._file.begin(self._descriptor)
            return self._descriptor

    def close(self) -> None:
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None
