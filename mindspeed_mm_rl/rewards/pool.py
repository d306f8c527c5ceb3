"""Grades groups in processes of their own, beside generation, and lives on when one of them hangs or dies.

One thread per worker process:  submit -> queue -> thread -> pipe -> worker, one answer per sample back, Future when the last is in.
The deadline is per sample: a late worker is killed, that sample is wrong, a new worker goes on with the rest of the group.

Plain subprocesses instead of multiprocessing's: those import the driver's main module again, and with it torch and Ray.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing import Pipe

from mindspeed_mm_rl.rewards.scoring import GroupScores, RewardSettings, SampleScore, grading_error, weigh, wrong_sample

_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from mindspeed_mm_rl.rewards.worker import main; main(int(sys.argv[1]))"
_START_SECONDS = 120.0
"""Importing sympy takes under a second, but minutes on a cold network disk."""
_ATTEMPTS = 2
"""A worker may be killed from outside (memory pressure) while it grades an innocent sample: each sample gets a second chance."""


class _WorkerDied(Exception):
    """The worker process ended while an answer was due."""


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


class _Worker:
    """One grading process; its pipe is in step with it or the process is killed."""

    def __init__(self, settings: RewardSettings) -> None:
        self.pipe, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-c", _BOOT, str(theirs.fileno()), json.dumps(sys.path)]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        self._send({"verifiers": settings.verifiers, "timeout": settings.timeout_seconds})

    def wait_ready(self) -> None:
        """Raises RuntimeError when the worker cannot grade: a grader is not installed, or is broken."""
        try:
            message = self.receive(_START_SECONDS)
        except _WorkerLate:
            self.process.kill()
            raise RuntimeError(f"a reward worker was not ready after {_START_SECONDS:.0f} s") from None
        except _WorkerDied:
            raise RuntimeError(f"a reward worker ended while it started (exit code {self.process.wait()})") from None
        if "error" in message:
            raise RuntimeError(f"a reward worker could not start: {message['error'].strip().splitlines()[-1]}\n{message['error']}")

    def grade(self, texts: Sequence[str], answer: str) -> None:
        self._send({"texts": list(texts), "answer": answer})

    def receive(self, seconds: float) -> dict[str, object]:
        if not self.pipe.poll(seconds):
            raise _WorkerLate
        try:
            return json.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            raise _WorkerDied from None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()

    def _send(self, message: dict[str, object]) -> None:
        # A dead worker is seen, and replaced, where its answer is waited for.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send_bytes(json.dumps(message).encode())


class _Lane(threading.Thread):
    """Feeds one worker process, and replaces it."""

    def __init__(self, settings: RewardSettings, tasks: queue.SimpleQueue[_Task | None], number: int) -> None:
        super().__init__(name=f"rewards-{number}", daemon=True)
        self.settings, self.tasks = settings, tasks
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
            self.worker.process.kill()

    def _announce(self) -> None:
        try:
            self.worker.wait_ready()
        except RuntimeError as error:
            self.ready.set_exception(error)
        else:
            self.ready.set_result(None)

    def _grade(self, task: _Task) -> GroupScores:
        done: list[SampleScore] = []
        timeouts = crashes = attempt = 0
        self.worker.grade(task.texts, task.answer)
        while len(done) < len(task.texts):
            try:
                done.append(self._next_score(task, len(done)))
                attempt = 0
                continue
            except _WorkerLate:
                timeouts += 1
                done.append(wrong_sample(self.settings.verifiers))
                attempt = 0
            except _WorkerDied:
                attempt += 1
                if attempt == _ATTEMPTS:
                    crashes += 1
                    done.append(wrong_sample(self.settings.verifiers))
                    attempt = 0
            self._replace_worker()
            self.worker.grade(task.texts[len(done) :], task.answer)
        return weigh(done, task.token_lengths, self.settings, timeouts, crashes)

    def _next_score(self, task: _Task, index: int) -> SampleScore:
        message = self.worker.receive(self.settings.timeout_seconds)
        if "error" in message:
            where = f"sample {index} of prompt {task.prompt_id} of {task.data_source!r}"
            raise grading_error(where, task.answer, task.texts[index], self.settings.verifiers, message["error"])
        return SampleScore(**message)

    def _replace_worker(self) -> None:
        self.worker.kill()
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
        self._lanes = [_Lane(settings, self._tasks, number) for number in range(settings.workers)]
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

        The future raises RuntimeError when a verifier raised (naming sample and prompt) or no worker can grade.
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
            lane.worker.kill()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
