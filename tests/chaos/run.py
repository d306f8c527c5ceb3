"""One `mm-rl train` as a user would start it, followed from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tests.chaos.processes import MARKER, Footprint, read_process, send, shared_memory_names

REPOSITORY = Path(__file__).parents[2]
ERROR = "error: "
_STOP_SECONDS = 0.05


@dataclass
class Console:
    """Every line that a run prints, with the time at which it came."""

    lines: list[tuple[float, str]] = field(default_factory=list)

    def follow(self, stream: IO[str], copy: IO[str]) -> None:
        for line in stream:
            self.lines.append((time.monotonic(), line.rstrip("\n")))
            copy.write(line)
            copy.flush()

    def tail(self) -> str:
        return "\n".join(line for _, line in self.lines[-10:])

    def errors(self) -> list[tuple[float, str]]:
        """The messages that ended the run, and when they came."""
        return [(when, line) for when, line in self.lines if line.startswith(ERROR)]

    def wait_for_error(self, until: float) -> None:
        while not self.errors() and time.monotonic() < until:
            time.sleep(0.1)
        # A second message would be one too many.
        time.sleep(1.0)


class TrainRun:
    """A context: what is left of the run at its end is killed, by pid."""

    def __init__(self, config: Path, *overrides: str) -> None:
        self.config, self.overrides = config, overrides
        self.save, self.metrics = config.parent / "save", config.parent / "logs" / "metrics.jsonl"
        self.console = Console()

    def __enter__(self) -> TrainRun:
        marker = uuid.uuid4().hex
        self.footprint = Footprint(marker, shared_memory_names())
        # Ray keeps sockets in its folder, whose path must be short.
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
            MARKER: marker,
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONUNBUFFERED": "1",
        }
        command = [sys.executable, "-m", "mindspeed_mm_rl.cli.main", "train", "--config", str(self.config), *self.overrides]
        self.log = (self.config.parent / "console.txt").open("a")
        self.driver = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env=environment, start_new_session=True, cwd=self.config.parent,
        )  # fmt: skip
        self.reader = threading.Thread(target=self.console.follow, args=(self.driver.stdout, self.log), daemon=True)
        self.reader.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.footprint.end()
        self.driver.wait()
        # The pipe is closed by the last process that holds it.
        self.reader.join(timeout=10)
        self.log.close()

    @property
    def is_over(self) -> bool:
        return self.driver.poll() is not None

    def iterations_done(self) -> int:
        """Iterations whose metrics are written."""
        try:
            return self.metrics.read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None when the time was over."""
        try:
            return self.driver.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


def freeze(pids: Sequence[int]) -> None:
    """Returns when they have stopped; one that waits for a disk stops afterwards."""
    for pid in pids:
        send(pid, signal.SIGSTOP)
    end = time.monotonic() + _STOP_SECONDS
    while time.monotonic() < end and any((process := read_process(pid)) and process.state not in "TZ" for pid in pids):
        pass


def thaw(pids: Sequence[int]) -> None:
    for pid in pids:
        send(pid, signal.SIGCONT)
