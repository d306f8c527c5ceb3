"""The processes that grade: a keeper that has imported everything, and its child that grades and may be killed at any moment.

pool thread                          keeper                              grader (a fork of the keeper)
   |  {"verifiers", "timeout"} ---->   loads users' functions, limits itself, self-check
   |  <----------------------------  {"problem"} of a user's function, or {"error"}, and the end
   |                                   forks ------------------------>
   |  <-----------------------------------------------------------------  {"ready", "pid"}
   |  {"task", "texts", "question", "verifiers"} ---------------------->
   |  <-----------------------------------------------------------------  {"task", "scores", "accuracy", "metrics"} per text, in order
   |  <-----------------------------------------------------------------  {"task", "error"} in its place when a verifier raises
   |  <----------------------------  {"died": exit code}, forks again ->  {"ready", "pid"}

A fork costs milliseconds where a new process imports sympy for half a second, or for several on a machine that is busy sampling.
Both import nothing heavy and talk JSON over one pipe. A task number tells answers to an earlier grader's task from those to this one's.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import NoReturn

from mindspeed_mm_rl.rewards import custom
from mindspeed_mm_rl.rewards.registry import FALLBACK_JUDGE, VERIFIERS, find_verifier, score_names
from mindspeed_mm_rl.rewards.scoring import Question, score_sample

_MEMORY_BYTES = 512 << 20
"""A power tower in a response may ask for all of the machine; grading uses about 0.1 GiB. What a user's file has loaded comes on top."""
_OUT_OF_MEMORY = 12
"""Exit code; the pool counts it as a crash."""
_POOL_GONE = 113
"""Exit code of a grader that has nobody to grade for."""
_PR_SET_PDEATHSIG = 1
_ORPHAN_GRACE_SECONDS = 1.0
_TOLD_CHARACTERS = 4000
"""A message that fits the pipe's buffer is sent whole or not at all, whenever the grader is killed."""


class _Stopped(BaseException):
    """SIGTERM came: the pool is closed."""


def main(descriptor: int) -> None:
    signal.signal(signal.SIGTERM, _stop)
    try:
        # Outside of all else: the signal may come while the end of the pipe is being handled.
        with Connection(descriptor) as pipe, contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
            _serve(pipe)  # Until the pool is gone.
    except _Stopped:
        # The exit code says what happened.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped


def _serve(pipe: Connection) -> None:
    order = json.loads(pipe.recv_bytes())
    # An interrupt of the terminal is for the driver, which then closes the pool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The pool kills a grader that is late. Should the pool be dead itself, the kernel does: default action, no Python involved.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        for name in filter(custom.is_function, order["verifiers"]):
            custom.load(name)
    except ValueError as problem:
        _send(pipe, {"problem": str(problem)})
        return
    try:
        self_check(order["verifiers"])
        _limit_harm()
    except Exception:
        _send(pipe, {"error": traceback.format_exc()})
        return
    while True:
        grader = os.fork()
        if not grader:
            _be_grader(pipe, order["timeout"])
        exit_code = _end_of(grader)
        if exit_code == _POOL_GONE:
            return
        _send(pipe, {"died": exit_code})


def _end_of(grader: int) -> int:
    """Its exit code. A grader that outlives its keeper would be nobody's to reap."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(grader, 0)[1])
    except _Stopped:
        # The signal may come when it has just been reaped.
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(grader, signal.SIGKILL)
            os.waitpid(grader, 0)
        raise


def _be_grader(pipe: Connection, timeout: float) -> NoReturn:
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _end_with_keeper()
        _send(pipe, {"ready": True, "pid": os.getpid()})
        while True:
            task = json.loads(pipe.recv_bytes())
            question = Question(**task["question"])
            for text in task["texts"]:
                signal.setitimer(signal.ITIMER_REAL, timeout + _ORPHAN_GRACE_SECONDS)
                _grade(pipe, task["task"], text, question, task["verifiers"])
                signal.setitimer(signal.ITIMER_REAL, 0.0)
    finally:
        # Nothing of the keeper's that is on the stack may run here too. Only a closed pipe leads here.
        os._exit(_POOL_GONE)


def _grade(pipe: Connection, number: int, text: str, question: Question, verifiers: Sequence[str]) -> None:
    try:
        # A score that is no finite number would make the advantages of its whole group NaN.
        answered = json.dumps({"task": number, **asdict(score_sample(text, question, verifiers))}, allow_nan=False)
    except MemoryError:
        # What is left of the process cannot be relied on.
        os._exit(_OUT_OF_MEMORY)
    except Exception:
        answered = json.dumps({"task": number, "error": traceback.format_exc()[-_TOLD_CHARACTERS:]})
    pipe.send_bytes(answered.encode())


def self_check(verifiers: Sequence[str]) -> None:
    """Grades the examples of every rule; also the warm-up, since graders import sympy on first use.

    Raises:
        RuntimeError: an example is not graded right.
    """
    for verifier in (find_verifier(name) for name in score_names([*verifiers, FALLBACK_JUDGE]) if name in VERIFIERS):
        for text, answer in verifier.examples:
            score = verifier.score(text, answer)
            if score != verifier.right:
                raise RuntimeError(f"verifier {verifier.name!r} is broken here: {text!r} for {answer!r} scored {score}")


def _limit_harm() -> None:
    """Bounds the memory of keeper and graders, and writes no core files."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    bound = mapped + _MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(mapped + _MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end_with_keeper() -> None:
    """Also: the first process that the kernel ends when the machine has no memory left."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _send(pipe: Connection, message: dict[str, object]) -> None:
    pipe.send_bytes(json.dumps(message).encode())
