"""Which part of the iteration a run is in, seen from outside: titles that Ray gives to working processes, and the names in the save folder.

A kill must hit its phase although phases last milliseconds: when the phase is seen, every process of the run is stopped, the phase is
looked at again, and only if it still holds the victim is killed and the others go on. Otherwise all go on and the next occasion is taken.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

from tests.chaos.processes import Process, read_process, send
from tests.chaos.run import TrainRun, freeze, thaw
from tests.chaos.scene import TRAIN_ITERS
from tests.chaos.stepping import led_while

DRIVER, ACTOR, ROLLOUT, REWARD = "driver", "actor", "rollout", "reward"
VICTIMS = (DRIVER, ACTOR, ROLLOUT, REWARD)
LAST_ITERATION = TRAIN_ITERS // 2
"""That a kill is planned for: those after it are further occasions for one that was missed."""
_TITLES = {"ray::ActorWorker": ACTOR, "ray::RolloutWorker": ROLLOUT}
_REWARD_WORKER = "mindspeed_mm_rl.rewards.worker"
_TRACKER = "latest_checkpointed_iteration.txt"
_POLL_SECONDS, _FOLLOW_SECONDS = 0.0005, 0.002
_START_SECONDS, _START_POLL_SECONDS = 240.0, 0.5


def role_of(process: Process, driver: int) -> str | None:
    if process.pid == driver:
        return DRIVER
    if _REWARD_WORKER in process.title:
        return REWARD
    return next((role for title, role in _TITLES.items() if process.title.startswith(title)), None)


@dataclass
class Watch:
    """The run's processes by role, and cheap questions about them."""

    run: TrainRun
    pids: dict[str, list[int]] = field(default_factory=dict)

    def find(self) -> None:
        self.pids = {}
        for process in self.run.footprint.processes():
            role = role_of(process, self.run.driver.pid)
            if role is not None:
                self.pids.setdefault(role, []).append(process.pid)

    @property
    def everyone(self) -> list[int]:
        return [pid for pids in self.pids.values() for pid in pids]

    @property
    def is_whole(self) -> bool:
        return all(self.pids.get(role) for role in VICTIMS)

    def does(self, role: str, *verbs: str) -> bool:
        processes = [process for pid in self.pids.get(role, []) if (process := read_process(pid))]
        return any(process.title.endswith(f".{verb}") for process in processes for verb in verbs)

    def grades(self) -> bool:
        """A reward process computes (R), or did when it was stopped; it sleeps in a read otherwise."""
        processes = [process for pid in self.pids.get(REWARD, []) if (process := read_process(pid))]
        return any(process.state in "RT" for process in processes)

    def tracked(self) -> int:
        try:
            return int((self.run.save / _TRACKER).read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def saves(self) -> list[int]:
        return sorted(int(folder.name[len("iter_") :]) for folder in self.run.save.glob("iter_*"))

    def removes_old(self) -> bool:
        return bool(self.saves()) and (self.saves()[0] < self.tracked() or any(self.run.save.glob(".iter_*.removed")))

    def writes_partial(self, with_state: bool) -> bool:
        return any((folder / "state.json").exists() == with_state for folder in self.run.save.glob(".iter_*.partial"))


@dataclass(frozen=True)
class Phase:
    name: str
    holds: Callable[[Watch], bool]
    first_iteration: int = 1
    before: Callable[[Watch], bool] | None = None
    """What holds just before a phase that is too short to be met by looking now and then; the driver is then led into it step by step."""


PHASES = (
    Phase("encode", lambda watch: watch.does(ACTOR, "encode")),
    Phase("collect", lambda watch: watch.does(ROLLOUT, "generate")),
    Phase("rewards", lambda watch: watch.grades()),
    Phase("log-probs", lambda watch: watch.does(ACTOR, "logprobs", "ref_logprobs")),
    Phase("update", lambda watch: watch.does(ACTOR, "update")),
    Phase(
        "push", lambda watch: watch.does(ACTOR, "publish_weights", "send_weights") or watch.does(ROLLOUT, "receive_weights", "empty_inbox")
    ),
    Phase("save: weights are written", lambda watch: watch.writes_partial(with_state=False)),
    Phase("save: before the rename", lambda watch: watch.writes_partial(with_state=True)),
    Phase(
        "save: before the tracker",
        lambda watch: watch.saves()[-1:] > [watch.tracked()],
        before=lambda watch: watch.writes_partial(with_state=True),
    ),
    Phase("save: old one is removed", lambda watch: watch.removes_old(), first_iteration=2),
)
_NAMES = tuple(phase.name for phase in PHASES)


@dataclass(frozen=True)
class Kill:
    """Example: Kill(setting="grpo", victim="actor", phase=PHASES[3], iteration=2)."""

    setting: str
    victim: str
    phase: Phase
    iteration: int


def plan_kills(count: int, seed: int, settings: tuple[str, ...]) -> list[Kill]:
    """All pairs of victim and phase in random order, then again, so that the first few differ in both; the rest of a kill is drawn."""
    rng = random.Random(seed)
    kills: list[Kill] = []
    while len(kills) < count:
        pairs = [(victim, phase) for phase in PHASES for victim in VICTIMS]
        rng.shuffle(pairs)
        for victim, phase in pairs:
            setting = settings[len(kills) % len(settings)]
            kills.append(Kill(setting, victim, phase, rng.randint(phase.first_iteration, LAST_ITERATION)))
    return kills[:count]


@dataclass(frozen=True)
class Hit:
    pid: int
    title: str
    when: float
    iteration: int


def strike(run: TrainRun, kill: Kill, longest_wait: float, rng: random.Random) -> Hit | None:
    """Waits for the phase, then up to `longest_wait` seconds in it, and kills; None when the last iteration was over before."""
    watch = Watch(run)
    wait_whole(watch)
    while not run.is_over and run.iterations_done() < TRAIN_ITERS:
        if run.iterations_done() + 1 >= kill.iteration and _seems_to_be_in(kill.phase, watch, longest_wait * rng.random()):
            with _held(watch, kill.phase):
                if kill.phase.holds(watch):
                    return _kill(run, rng.choice(watch.pids[kill.victim]))
        time.sleep(_POLL_SECONDS)
    return None


def _seems_to_be_in(phase: Phase, watch: Watch, seconds: float) -> bool:
    """Whether the phase holds, and still does after a while; of one that is led into, whether what comes before it holds."""
    if phase.before is not None:
        return phase.before(watch)
    if not phase.holds(watch):
        return False
    time.sleep(seconds)
    return phase.holds(watch)


@contextmanager
def _held(watch: Watch, phase: Phase) -> Iterator[None]:
    """Nothing of the run moves inside the block."""
    before = phase.before
    driver, others = watch.pids[DRIVER], [pid for pid in watch.everyone if pid not in watch.pids[DRIVER]]
    freeze(others if before else others + driver)
    try:
        with led_while(driver[0], lambda: before(watch)) if before else nullcontext():
            yield
    finally:
        thaw(watch.everyone)


def _kill(run: TrainRun, pid: int) -> Hit:
    # Stopped processes hold still while their sockets and files are listed.
    run.footprint.look()
    process, iteration = read_process(pid), run.iterations_done() + 1
    send(pid, signal.SIGKILL)
    return Hit(pid, process.title if process else "", time.monotonic(), iteration)


def wait_whole(watch: Watch) -> None:
    """Waits until every process has been started; raises TimeoutError when that takes too long. Returns at once when the run is over."""
    end = time.monotonic() + _START_SECONDS
    while not watch.run.is_over:
        watch.find()
        if watch.is_whole:
            return
        if time.monotonic() > end:
            raise TimeoutError(f"the run has not started all of {VICTIMS} within {_START_SECONDS:.0f} s: {watch.pids}")
        time.sleep(_START_POLL_SECONDS)


def usual_lengths(run: TrainRun) -> dict[str, float]:
    """Follows an undisturbed run to its end; the mean seconds that each phase lasts."""
    watch = Watch(run)
    wait_whole(watch)
    spent, times, since = dict.fromkeys(_NAMES, 0.0), dict.fromkeys(_NAMES, 0), {}
    while not run.is_over:
        for phase in PHASES:
            holds, now = phase.holds(watch), time.monotonic()
            if holds:
                since.setdefault(phase.name, now)
            elif phase.name in since:
                spent[phase.name] += now - since.pop(phase.name)
                times[phase.name] += 1
        time.sleep(_FOLLOW_SECONDS)
    return {name: spent[name] / max(1, times[name]) for name in _NAMES}
