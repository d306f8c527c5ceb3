"""The process that grades. It imports nothing heavy, talks JSON over one pipe, and may be killed at any moment.

pool thread                              worker
   |  {"verifiers", "timeout"}  ------->   limits itself, grades every verifier's examples
   |  <-------  {"ready": true}
   |  {"texts", "answer"}       ------->
   |  <-------  {"scores", "accuracy"}     one message per text, in order
   |  <-------  {"error"}                  in its place when a verifier raises
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

from mindspeed_mm_rl.rewards.registry import find_verifier, score_names
from mindspeed_mm_rl.rewards.scoring import score_sample

_MEMORY_BYTES = 1 << 30
"""A power tower in a response may ask for all of the machine; grading uses about 0.1 GiB."""
_OUT_OF_MEMORY = 12
"""Exit code; the pool counts it as a crash."""
_ORPHAN_GRACE_SECONDS = 1.0


def main(descriptor: int) -> None:
    with Connection(descriptor) as pipe:
        try:
            _serve(pipe)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # The pool is gone.


def _serve(pipe: Connection) -> None:
    order = json.loads(pipe.recv_bytes())
    # An interrupt of the terminal is for the driver, which then closes the pool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The pool kills a worker that is late. Should the pool be dead itself, the kernel does: default action, no Python involved.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        _limit_harm()
        self_check(order["verifiers"])
    except Exception:
        _send(pipe, {"error": traceback.format_exc()})
        return
    _send(pipe, {"ready": True})
    while True:
        task = json.loads(pipe.recv_bytes())
        for text in task["texts"]:
            signal.setitimer(signal.ITIMER_REAL, order["timeout"] + _ORPHAN_GRACE_SECONDS)
            _grade(pipe, text, task["answer"], order["verifiers"])
            signal.setitimer(signal.ITIMER_REAL, 0.0)


def _grade(pipe: Connection, text: str, answer: str, verifiers: Sequence[str]) -> None:
    try:
        message = asdict(score_sample(text, answer, verifiers))
    except MemoryError:
        # What is left of the process cannot be relied on.
        os._exit(_OUT_OF_MEMORY)
    except Exception:
        message = {"error": traceback.format_exc()}
    _send(pipe, message)


def self_check(verifiers: Sequence[str]) -> None:
    """Grades the examples of every verifier; also the warm-up, since graders import sympy on first use.

    Raises:
        RuntimeError: an example is not graded right.
    """
    for verifier in map(find_verifier, score_names([*verifiers, "acc"])):
        for text, answer in verifier.examples:
            score = verifier.score(text, answer)
            if score != verifier.right:
                raise RuntimeError(f"verifier {verifier.name!r} is broken here: {text!r} for {answer!r} scored {score}")


def _limit_harm() -> None:
    """Bounds this process's memory, writes no core files, and is the first that the kernel ends when the machine has no memory left."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = _MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(_MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _send(pipe: Connection, message: dict[str, object]) -> None:
    pipe.send_bytes(json.dumps(message).encode())
