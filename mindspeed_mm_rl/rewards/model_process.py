"""Feeds the process of a reward model, and replaces it: prompts wait in a queue, each gives a Future of its samples' scores.

A process that is late or dies is replaced and asked once more. Where that fails too, the samples of the prompt all score 0, which is no
advantage for any of them, and are counted; after `_BROKEN_AFTER` such prompts in a row the run ends.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from mindspeed_mm_rl.rewards.process import PipedProcess, ProcessDied, ProcessLate, boot_code

_BOOT = boot_code("model")
_START_SECONDS = 1800.0
"""Tens of gigabytes may come from a network disk."""
_BROKEN_AFTER = 3

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelScores:
    scores: list[float]
    interval: tuple[float, float]
    """Seconds of time.perf_counter."""
    timeouts: int = 0
    """Samples that got 0 because the model was late, twice."""
    crashes: int = 0
    """Samples that got 0 because the model failed."""


@dataclass(frozen=True)
class _Task:
    prompt_id: int
    messages: list[dict[str, Any]]
    responses: list[str]
    future: Future[ModelScores] = field(default_factory=Future)


class _ModelFailed(Exception):
    def __init__(self, cause: str, is_gone: bool = False, is_late: bool = False) -> None:
        super().__init__(cause)
        self.is_gone, self.is_late = is_gone, is_late
        """Its process must be replaced; because it was late."""


class ModelProcess(threading.Thread):
    """One process and the thread that talks to it. `ready` raises ValueError for a model that can't be used, RuntimeError when it dies."""

    def __init__(self, folder: str, timeout_seconds: float) -> None:
        super().__init__(name="reward-model", daemon=True)
        self.folder, self.timeout_seconds = folder, timeout_seconds
        self.ready: Future[None] = Future()
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._count = self._failed = 0
        self._lock = threading.Lock()
        self._closed = False
        self._process = self._new_process()
        self.start()

    def submit(self, prompt_id: int, messages: Sequence[Mapping[str, Any]], responses: Sequence[str]) -> Future[ModelScores]:
        task = _Task(prompt_id, [dict(message) for message in messages], list(responses))
        self._tasks.put(task)
        return task.future

    def close(self) -> None:
        """Futures that have no scores yet fail. May be called twice."""
        with self._lock:
            self._closed = True
            self._process.terminate()
        self._tasks.put(None)
        self.join()
        self._process.close()

    def run(self) -> None:
        try:
            self._wait_ready()
        except (ValueError, RuntimeError) as error:
            self.ready.set_exception(error)
        else:
            self.ready.set_result(None)
        while (task := self._tasks.get()) is not None:
            try:
                self.ready.result()
                task.future.set_result(self._score(task))
            except Exception as error:  # A Future carries it to whoever asked.
                task.future.set_exception(error)

    def _new_process(self) -> PipedProcess:
        process = PipedProcess(_BOOT)
        process.send({"folder": self.folder, "timeout": self.timeout_seconds})
        return process

    def _wait_ready(self) -> None:
        try:
            message = self._process.receive(_START_SECONDS)
        except ProcessLate:
            raise RuntimeError(f"the reward model {self.folder} was not ready after {_START_SECONDS:.0f} s") from None
        except ProcessDied as death:
            raise RuntimeError(f"the process of the reward model {self.folder} ended while it started ({death.exit_code})") from None
        if "problem" in message:
            raise ValueError(message["problem"])

    def _score(self, task: _Task) -> ModelScores:
        """Raises RuntimeError when the model fails again and again, or the pool was closed."""
        start = time.perf_counter()
        try:
            scores = self._asked_twice(task)
        except _ModelFailed as failure:
            self._failed += 1
            error = RuntimeError(f"the reward model {self.folder} failed on prompt {task.prompt_id}: {failure}")
            if self._failed >= _BROKEN_AFTER:
                raise error from None
            _logger.warning("%s\nIts samples score 0 and are counted", error)
            count, interval = len(task.responses), (start, time.perf_counter())
            return ModelScores([0.0] * count, interval, *((count, 0) if failure.is_late else (0, count)))
        self._failed = 0
        return ModelScores(scores, (start, time.perf_counter()))

    def _asked_twice(self, task: _Task) -> list[float]:
        try:
            return self._asked(task)
        except _ModelFailed as failure:
            if not failure.is_gone:
                raise
        self._replace()
        try:
            return self._asked(task)
        except _ModelFailed as failure:
            if failure.is_gone:
                self._replace()
            raise

    def _asked(self, task: _Task) -> list[float]:
        self._count += 1
        self._process.send({"task": self._count, "messages": task.messages, "responses": task.responses})
        try:
            message = self._process.answer(self._count, self.timeout_seconds)
        except ProcessLate:
            self._process.kill()
            cause = f"no answer within rl_config.reward_model_timeout ({self.timeout_seconds:g} s)"
            raise _ModelFailed(cause, is_gone=True, is_late=True) from None
        except ProcessDied as death:
            raise _ModelFailed(f"its process ended (exit code {death.exit_code})", is_gone=True) from None
        if "error" in message:
            raise _ModelFailed(str(message["error"]))
        if not all(map(math.isfinite, message["scores"])):
            raise _ModelFailed(f"scores that are not finite: {message['scores']}")
        return message["scores"]

    def _replace(self) -> None:
        self._process.close()
        with self._lock:
            if self._closed:
                raise RuntimeError("the reward pool was closed while its model was scoring")
            self._process = self._new_process()
        self._wait_ready()
