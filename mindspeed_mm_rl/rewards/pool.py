"""Grades groups in processes of their own, beside generation, and lives on when one of them hangs or dies.

One thread per worker process:  submit -> queue -> thread -> pipe -> worker, one answer per sample back, Future when the last is in.
The deadline is per sample: a late grader is killed, that sample is wrong, a new one goes on with the rest of the group. So it is with a
grader that dies or runs out of memory. A verifier that raises costs its sample alone. All of them are counted.
A reward model scores the same group meanwhile, in a process of its own (model_process.py); the thread puts both together.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mindspeed_mm_rl.rewards import custom
from mindspeed_mm_rl.rewards.model_process import ModelProcess, ModelScores
from mindspeed_mm_rl.rewards.patience import Patience
from mindspeed_mm_rl.rewards.process import PipedProcess, ProcessDied, ProcessLate, boot_code
from mindspeed_mm_rl.rewards.scoring import GroupScores, Question, RewardSettings, Rule, SampleScore, grading_error, killed_sample, weigh

_BOOT = boot_code("worker")
_START_SECONDS = 120.0
"""Importing sympy takes under a second, but minutes on a cold network disk."""
_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)
"""Exit codes of a worker that something else ended (memory pressure, a person), maybe over an innocent sample: it gets a second chance."""
_BROKEN_AFTER = 64
"""Samples whose grading raised, without one that was graded in between: then the verifier is broken, not the response."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Task:
    prompt_id: int
    texts: list[str]
    token_lengths: list[int]
    question: Question
    rule: Rule
    model: Future[ModelScores] | None
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
        self.keeper = PipedProcess(_BOOT)
        self._task = 0
        self._grader: int | None = None
        """Process id; None while there is none."""
        names = dict.fromkeys(name for rule in settings.rules.values() for name in rule.verifiers)
        self.keeper.send({"verifiers": list(names), "timeout": settings.timeout_seconds})

    def wait_ready(self) -> None:
        """Raises RuntimeError when the worker cannot grade (a grader is not installed, or is broken), ValueError for a user's function."""
        try:
            self._wait_for_grader()
        except ProcessLate:
            self.keeper.kill()
            raise RuntimeError(f"a reward worker was not ready after {_START_SECONDS:.0f} s") from None
        except ProcessDied as death:
            raise RuntimeError(f"a reward worker ended while it started (exit code {death.exit_code})") from None

    def grade(self, texts: Sequence[str], question: Question, verifiers: Sequence[str]) -> None:
        self._task += 1
        self.keeper.send({"task": self._task, "texts": list(texts), "question": asdict(question), "verifiers": list(verifiers)})

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next answer to the last task. Raises ProcessDied or ProcessLate; `restart` comes next then."""
        message = self.keeper.answer(self._task, seconds)
        if "died" in message:
            self._grader = None
            raise ProcessDied(message["died"])
        return message

    def restart(self) -> None:
        """A new grader, which waits for a task. Raises ProcessDied or ProcessLate when the keeper is gone too."""
        if self._grader is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._grader, signal.SIGKILL)
        self._wait_for_grader()

    def _wait_for_grader(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while "ready" not in (message := self.keeper.receive(deadline - time.monotonic())):
            if "problem" in message:
                raise ValueError(message["problem"])
            if "error" in message and "task" not in message:
                raise RuntimeError(f"a reward worker could not start: {message['error'].strip().splitlines()[-1]}\n{message['error']}")
        self._grader = message["pid"]


def check_functions(settings: RewardSettings) -> None:
    """Loads the users' functions as the graders will. Raises ValueError for a file, a name or arguments that are wrong."""
    if not any(custom.is_function(name) for rule in settings.rules.values() for name in rule.verifiers):
        return
    worker = _Worker(settings)
    try:
        worker.wait_ready()
    finally:
        worker.keeper.close()


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
            self.worker.keeper.terminate()

    def _announce(self) -> None:
        try:
            self.worker.wait_ready()
        except (RuntimeError, ValueError) as error:
            self.ready.set_exception(error)
        else:
            self.ready.set_result(None)

    def _grade(self, task: _Task) -> GroupScores:
        done: list[SampleScore] = []
        timeouts = crashes = 0
        self.worker.grade(task.texts, task.question, task.rule.verifiers)
        while len(done) < len(task.texts):
            score = None
            try:
                score = self._next_score(task, len(done))
                crashes += score is None
            except ProcessLate:
                timeouts += 1
                self._go_on(task, len(done) + 1)
            except ProcessDied:
                crashes += 1
                self._go_on(task, len(done) + 1)
            done.append(score or killed_sample(task.rule.verifiers))
        if task.model is None:
            return weigh(done, task.token_lengths, self.settings, task.rule, None, timeouts, crashes)
        model = task.model.result()
        group = weigh(done, task.token_lengths, self.settings, task.rule, model.scores, timeouts + model.timeouts, crashes + model.crashes)
        return replace(group, model_interval=model.interval)

    def _next_score(self, task: _Task, index: int) -> SampleScore | None:
        """None when a verifier raised on it."""
        try:
            message = self._answer()
        except ProcessDied as death:
            if death.exit_code not in _FROM_OUTSIDE:
                raise
            self._go_on(task, index)
            message = self._answer()
        if "error" not in message:
            self.faults.graded()
            return SampleScore(**message)
        where = f"sample {index} of prompt {task.prompt_id} of {task.question.data_source!r}"
        self.faults.raised(grading_error(where, task.question.answer, task.texts[index], task.rule.verifiers, message["error"]))
        return None

    def _answer(self) -> dict[str, Any]:
        start = time.monotonic()
        try:
            message = self.worker.answer(self.patience.seconds())
        except ProcessLate:
            self.patience.late()
            raise
        self.patience.in_time(time.monotonic() - start)
        return message

    def _go_on(self, task: _Task, index: int) -> None:
        """A new grader for the samples from `index` on."""
        try:
            self.worker.restart()
        except (ProcessDied, ProcessLate):
            self._replace_worker()
        self.worker.grade(task.texts[index:], task.question, task.rule.verifiers)

    def _replace_worker(self) -> None:
        self.worker.keeper.close()
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
        self._model = ModelProcess(settings.reward_model, settings.reward_model_timeout) if settings.asks_model else None
        patience, faults = Patience(settings.timeout_seconds), _Faults()
        self._lanes = [_Lane(settings, self._tasks, patience, faults, number) for number in range(settings.workers)]
        for lane in self._lanes:
            lane.start()

    def wait_ready(self) -> None:
        """Raises RuntimeError when a worker cannot grade, ValueError for a function or a reward model that can't be used."""
        for lane in self._lanes:
            lane.ready.result()
        if self._model:
            self._model.ready.result()

    def submit(
        self,
        prompt_id: int,
        texts: Sequence[str],
        token_lengths: Sequence[int],
        answer: str,
        data_source: str = "",
        extra: Mapping[str, Any] | None = None,
        messages: Sequence[Mapping[str, Any]] = (),
    ) -> Future[GroupScores]:
        """Grades the samples of one prompt; returns at once. `extra` is for users' functions, `messages` (the prompt) for the reward model.

        The future raises RuntimeError when verifiers raise on every sample (naming the last one) or no worker can grade.
        """
        if self._closed:
            raise RuntimeError(f"the reward pool is closed; prompt {prompt_id} cannot be graded")
        if len(texts) != len(token_lengths):
            raise ValueError(f"prompt {prompt_id}: {len(texts)} responses to grade but {len(token_lengths)} lengths")
        rule = self.settings.rule(data_source)
        if rule.asks_model and not messages:
            raise ValueError(
                f"prompt {prompt_id} of {data_source!r} has token ids alone, and a reward model reads messages: use parquet or JSON rows"
            )
        model = self._model.submit(prompt_id, messages, texts) if self._model and rule.asks_model else None
        task = _Task(prompt_id, list(texts), list(token_lengths), Question(answer, data_source, dict(extra or {})), rule, model)
        self._tasks.put(task)
        return task.future

    def close(self) -> None:
        """Cancels what has not begun, kills and reaps every worker. May be called twice."""
        self._closed = True
        while not self._tasks.empty():
            if (task := self._tasks.get()) is not None:
                task.future.cancel()
        if self._model:
            self._model.close()
        for lane in self._lanes:
            self._tasks.put(None)
            lane.close()
        for lane in self._lanes:
            lane.join()
            lane.worker.keeper.close()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
