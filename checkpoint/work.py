"""Files written several at a time, with one bar over the bytes of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Event

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from checkpoint.sources import sound


@dataclass(frozen=True)
class Job:
    name: str
    size: int
    """Bytes of weights."""
    run: Callable[[], None]


class Stopped(Exception):
    """Another file failed first."""


class Work:
    """Use as a context; `watch` is what writers pass every tensor through."""

    def __init__(self, title: str, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}; it must be at least 1")
        self.title = title
        self.workers = workers
        self._stop = Event()
        columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task(title)

    def watch(self, name: str, tensor: Tensor) -> Tensor:
        """Refuses NaN, counts the bytes."""
        if self._stop.is_set():
            raise Stopped
        self._progress.advance(self._task, tensor.nbytes)
        return sound(name, tensor)

    def run(self, jobs: Sequence[Job]) -> None:
        """Raises what the first job that fails raises; the others end at their next tensor."""
        self._progress.update(self._task, total=sum(job.size for job in jobs))
        with self._progress, ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(job.run) for job in jobs]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self._stop.set() if any(not future.done() or future.exception() for future in futures) else None
                for future in futures:
                    future.cancel()
        for future in sorted(done, key=lambda future: isinstance(future.exception(), Stopped)):
            future.result()
