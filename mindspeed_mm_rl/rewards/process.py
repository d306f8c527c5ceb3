"""A Python process on the other end of a pipe, which speaks JSON.

Plain subprocesses instead of multiprocessing's: those import the driver's main module again, and with it torch and Ray.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from multiprocessing import Pipe
from typing import Any

_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from mindspeed_mm_rl.rewards.{} import main; main(int(sys.argv[1]))"
_END_SECONDS = 5.0


def boot_code(module: str) -> str:
    """Runs main(descriptor of the pipe) of a module of this folder."""
    return _BOOT.format(module)


class ProcessDied(Exception):
    """The process ended while an answer was due."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code


class ProcessLate(Exception):
    """The process did not answer within its deadline."""


class PipedProcess:
    def __init__(self, code: str) -> None:
        self.pipe, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-c", code, str(theirs.fileno()), json.dumps(sys.path)]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])

    def send(self, message: dict[str, Any]) -> None:
        # A dead process is seen, and replaced, where its answer is waited for. What JSON doesn't know (a date in extra_info) goes as text.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send_bytes(json.dumps(message, default=str).encode())

    def receive(self, seconds: float) -> dict[str, Any]:
        """The next message. Raises ProcessDied or ProcessLate."""
        if not self.pipe.poll(max(0.0, seconds)):
            raise ProcessLate
        try:
            return json.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            raise ProcessDied(self._exit_code()) from None

    def answer(self, task: int, seconds: float) -> dict[str, Any]:
        """The next message about `task`, or the news of a death; other tasks' are left out. Raises ProcessDied or ProcessLate."""
        deadline = time.monotonic() + seconds
        while True:
            message = self.receive(deadline - time.monotonic())
            if message.pop("task", None) == task or "died" in message:
                return message

    def terminate(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()

    def close(self) -> None:
        """Ends it; one that hangs is killed."""
        self.process.terminate()
        self._exit_code()
        self.pipe.close()

    def _exit_code(self) -> int:
        """Of a process that ends now, or is made to."""
        try:
            return self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
