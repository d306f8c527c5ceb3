"""Grades groups in processes of their own, beside generation, and lives on when one of them hangs or dies.

One thread per worker process:  submit -> queue -> thread -> pipe -> worker, one answer per sample back, Future when the last is in.
The deadline is per sample: a late grader is killed, that sample is wrong, a new one goes on with the rest of the group. So it is with a
grader that dies or runs out of memory. A verifier that raises costs its sample alone. All of them are counted.

Plain subprocesses instead of multiprocessing's: those import the driver's main module again, and with it torch and Ray.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing import Pipe

from mindspeed_mm_rl.rewards.patience import Patience
from mindspeed_mm_rl.rewards.scoring import GroupScores, RewardSettings, SampleScore, grading_error, weigh, wrong_sample

_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from mindspeed_mm_rl.rewards.worker import main; main(int(sys.argv[1]))"
_START_SECONDS = 120.0
"""Importing sympy takes under a second, but minutes on a cold network disk."""
_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)
"""Exit codes of a worker that something else ended (memory pressure, a person), maybe over an innocent sample: it gets a second chance."""
_BROKEN_AFTER = 64
"""Samples whose grading raised, without one that was graded in between: then the verifier is broken, not the response."""
_END_SECONDS = 5.0

_logger = logging.getLogger(__name__)


class _WorkerDied(Exception):
    """The worker process ended while an answer was due."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code


class _WorkerLate(Exception):
    """The worker process did not answer within its deadline."""


@dataclass(frozen=True)
class _Task:
    prompt_id: int
    texts: list[str]
    token_lengths: list[int]
    answer: str
    data_source: str
    future: Future[GroupScores] = field(default_factory=Future)


class _Faults:
    """Verifiers that raise: the first one is told, and nothing but them ends the run. Shared by all lanes."""

    def __init__(self) -> None:
        self._told = False
        self._in_a_row = 0
        self._lock = threading.Lock()

    def graded(self) -> None:
        with self._lock:
            self._in_a_row = 0

    def raised(self, error: RuntimeError) -> None:
        """Raises `error` when it is one of too many."""
        with self._lock:
            self._in_a_row += 1
            first, self._told = not self._told, True
            if self._in_a_row >= _BROKEN_AFTER:
                raise error
        if first:
            _logger.warning("%s\nThe sample gets the lowest score; later ones are only counted, in rewards/crashes", error)


class _Worker:
    """A keeper process and its grader (see worker.py)."""

    def __init__(self, settings: RewardSettings) -> None:
        self.pipe, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-c", _BOOT, str(theirs.fileno()), json.dumps(sys.path)]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        self._task = 0
        self._grader: int | None = None
        """Process id; None while there is none."""
        self._send({"verifiers": settings.verifiers, "timeout": settings.timeout_seconds})

    def wait_ready(self) -> None:
        """Raises RuntimeError when the worker cannot grade: a grader is not installed, or is broken."""
        try:
            self._wait_for_grader()
        except _WorkerLate:
            self.process.kill()
            raise RuntimeError(f"a reward worker was not ready after {_START_SECONDS:.0f} s") from None
        except _WorkerDied as death:
            raise RuntimeError(f"a reward worker ended while it started (exit code {death.exit_code})") from None

    def grade(self, texts: Sequence[str], answer: str) -> None:
        self._task += 1
        self._send({"task": self._task, "texts": list(texts), "answer": answer})

    def receive(self, seconds: float) -> dict[str, object]:
        """The next answer to the last task. Raises _WorkerDied or _WorkerLate; `restart` comes next then."""
        deadline = time.monotonic() + seconds
        while True:
            message = self._next(deadline - time.monotonic())
            if "died" in message:
                self._grader = None
                raise _WorkerDied(message["died"])
            if message.pop("task", None) == self._task:
                return message

    def restart(self) -> None:
        """A new grader, which waits for a task. Raises _WorkerDied or _WorkerLate when the keeper is gone too."""
        if self._grader is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._grader, signal.SIGKILL)
        self._wait_for_grader()

    def close(self) -> None:
        """Ends keeper and grader. A keeper that hangs is killed; the kernel then ends its grader."""
        self.process.terminate()
        self._exit_code()
        self.pipe.close()

    def _wait_for_grader(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while "ready" not in (message := self._next(deadline - time.monotonic())):
            if "error" in message and "task" not in message:
                raise RuntimeError(f"a reward worker could not start: {message['error'].strip().splitlines()[-1]}\n{message['error']}")
        self._grader = message["pid"]

    def _next(self, seconds: float) -> dict[str, object]:
        if not self.pipe.poll(max(0.0, seconds)):
            raise _WorkerLate
        try:
            return json.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            raise _WorkerDied(self._exit_code()) from None

    def _exit_code(self) -> int:
        """Of a keeper that ends now, or is made to."""
        try:
            return self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _send(self, message: dict[str, object]) -> None:
        # A dead worker is seen, and replaced, where its answer is waited for.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send_bytes(json.dumps(message).encode())


class _Lane(threading.Thread):
    """Feeds one worker process, and replaces it."""

    def __init__(
        self, settings: RewardSettings, tasks: queue.SimpleQueue[_Task | None], patience: Patience, faults: _Faults, number: int
    ) -> None:
        super().__init__(name=f"rewards-{number}", daemon=True)
        self.settings, self.tasks, self.patience, self.faults = settings, tasks, patience, faults
        self.ready: Future[None] = Future()
        self.lock = threading.Lock()
        self.closed = False
        self.worker = _Worker(settings)

    def run(self) -> None:
        self._announce()
        while (task := self.tasks.get()) is not None:
            if not task.future.set_running_or_notify_cancel():
                continue
            try:
                self.ready.result()
                task.future.set_result(self._grade(task))
            except Exception as error:  # A Future carries it to whoever asked.
                task.future.set_exception(error)

    def close(self) -> None:
        with self.lock:
            self.closed = True
            self.worker.process.terminate()

    def _announce(self) -> None:
        try:
            self.worker.wait_ready()
        except RuntimeError as error:
            self.ready.set_exception(error)
        else:
            self.ready.set_result(None)

    def _grade(self, task: _Task) -> GroupScores:
        done: list[SampleScore] = []
        timeouts = crashes = 0
        self.worker.grade(task.texts, task.answer)
        while len(done) < len(task.texts):
            score = None
            try:
                score = self._next_score(task, len(done))
                crashes += score is None
            except _WorkerLate:
                timeouts += 1
                self._go_on(task, len(done) + 1)
            except _WorkerDied:
                crashes += 1
                self._go_on(task, len(done) + 1)
            done.append(score or wrong_sample(self.settings.verifiers))
        return weigh(done, task.token_lengths, self.settings, timeouts, crashes)

    def _next_score(self, task: _Task, index: int) -> SampleScore | None:
        """None when a verifier raised on it."""
        try:
            message = self._answer()
        except _WorkerDied as death:
            if death.exit_code not in _FROM_OUTSIDE:
                raise
            self._go_on(task, index)
            message = self._answer()
        if "error" not in message:
            self.faults.graded()
            return SampleScore(**message)
        where = f"sample {index} of prompt {task.prompt_id} of {task.data_source!r}"
        self.faults.raised(grading_error(where, task.answer, task.texts[index], self.settings.verifiers, message["error"]))
        return None

    def _answer(self) -> dict[str, object]:
        start = time.monotonic()
        try:
            message = self.worker.receive(self.patience.seconds())
        except _WorkerLate:
            self.patience.late()
            raise
        self.patience.in_time(time.monotonic() - start)
        return message

    def _go_on(self, task: _Task, index: int) -> None:
        """A new grader for the samples from `index` on."""
        try:
            self.worker.restart()
        except (_WorkerDied, _WorkerLate):
            self._replace_worker()
        self.worker.grade(task.texts[index:], task.answer)

    def _replace_worker(self) -> None:
        self.worker.close()
        with self.lock:
            if self.closed:
                raise RuntimeError("the reward pool was closed while it was grading")
            self.worker = _Worker(self.settings)
        self.worker.wait_ready()


class RewardPool:
    """Example: with RewardPool(settings) as pool: pool.submit(7, texts, token_lengths, "55", "geometry3k").result().rewards

    Starting does not wait for the workers (about 0.5 s): call wait_ready() to have a broken grader fail before training does.
    """

    def __init__(self, settings: RewardSettings) -> None:
        self.settings = settings
        self._closed = False
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        patience, faults = Patience(settings.timeout_seconds), _Faults()
        self._lanes = [_Lane(settings, self._tasks, patience, faults, number) for number in range(settings.workers)]
        for lane in self._lanes:
            lane.start()

    def wait_ready(self) -> None:
        """Raises RuntimeError when a worker cannot grade."""
        for lane in self._lanes:
            lane.ready.result()

    def submit(
        self, prompt_id: int, texts: Sequence[str], token_lengths: Sequence[int], answer: str, data_source: str = ""
    ) -> Future[GroupScores]:
        """Grades the samples of one prompt; returns at once.

        The future raises RuntimeError when verifiers raise on every sample (naming the last one) or no worker can grade.
        """
        if self._closed:
            raise RuntimeError(f"the reward pool is closed; prompt {prompt_id} cannot be graded")
        if len(texts) != len(token_lengths):
            raise ValueError(f"prompt {prompt_id}: {len(texts)} responses to grade but {len(token_lengths)} lengths")
        task = _Task(prompt_id, list(texts), list(token_lengths), answer, data_source)
        self._tasks.put(task)
        return task.future

    def close(self) -> None:
        """Cancels what has not begun, kills and reaps every worker. May be called twice."""
        self._closed = True
        while not self._tasks.empty():
            if (task := self._tasks.get()) is not None:
                task.future.cancel()
        for lane in self._lanes:
            self._tasks.put(None)
            lane.close()
        for lane in self._lanes:
            lane.join()
            lane.worker.close()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
