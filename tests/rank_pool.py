"""Processes that take turns at jobs: each job runs on the first few of them, as the ranks of a world of its own.

A process imports torch and megatron once (some ten seconds); a job that fails or hangs is named, and takes only its own processes along.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.addresses import free_address

Job = Callable[..., Any]
"""job(rank, world, address, *arguments) -> something small; a function of a module."""

_JOBS_OF_A_PROCESS = 16
"""Threads of gloo groups outlive them: after a hundred jobs they take more of the machine than the ranks do."""
_GRACE_SECONDS = 5.0
"""For the other ranks to say what they saw, once one has failed."""


class RankPool:
    def __init__(self, seconds: float) -> None:
        """seconds: of one job, all ranks together."""
        self.seconds = seconds
        self._ranks: list[tuple[Any, Connection]] = []
        self._jobs = 0

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, world: int, job: Job, *arguments: Any) -> list[Any]:
        """What the ranks returned, in their order. Raises RuntimeError with the first failure, or naming the ranks that hang."""
        if self._jobs == _JOBS_OF_A_PROCESS:
            self.close()
        self._jobs += 1
        while len(self._ranks) < world:
            self._ranks.append(_started())
        address = free_address()
        for rank, (_, pipe) in enumerate(self._ranks[:world]):
            pipe.send((job, rank, world, address, arguments))
        answers, failures = self._collect(world)
        if len(answers) == world:
            return [answers[rank] for rank in range(world)]
        # The ranks that are left wait for those that failed, and always will.
        self.close()
        silent = [rank for rank in range(world) if rank not in answers and rank not in failures]
        told = [f"rank {rank} of {world}: {text}" for rank, text in failures.items()]
        raise RuntimeError("\n".join([*told, f"ranks without an answer: {silent}"] if silent else told))

    def _collect(self, world: int) -> tuple[dict[int, Any], dict[int, str]]:
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        pipes = {pipe: rank for rank, (_, pipe) in enumerate(self._ranks[:world])}
        end = time.monotonic() + self.seconds
        while pipes and (ready := wait(list(pipes), max(0.0, end - time.monotonic()))):
            for pipe in ready:
                rank = pipes.pop(pipe)
                try:
                    good, answer = pipe.recv()
                except EOFError:
                    good, answer = False, "the process died"
                (answers if good else failures)[rank] = answer
            if failures:
                end = min(end, time.monotonic() + _GRACE_SECONDS)
        return answers, failures

    def close(self) -> None:
        for process, pipe in self._ranks:
            pipe.close()
            # The process that megatron keeps for the results of its saves outlives the rank.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        for process, _ in self._ranks:
            process.join()
        self._ranks.clear()
        self._jobs = 0


def _started() -> tuple[Any, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # No daemon: megatron writes a save in processes of its own. It ends with its pipe.
    process = context.Process(target=_serve, args=(theirs,))
    process.start()
    # Only so does a pipe end when its process does.
    theirs.close()
    return process, ours


def _serve(pipe: Connection) -> None:
    os.setpgrp()
    while True:
        try:
            job, rank, world, address, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, job(rank, world, address, *arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
