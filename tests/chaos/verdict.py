"""What must be true after a kill: the message, nothing left, the last save whole, the resumed run equal to an undisturbed one."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mindspeed_mm_rl.models.weight_files import ITERATION_FILE, read_weights
from mindspeed_mm_rl.sinks import read_records
from tests.chaos.moments import ACTOR, DRIVER, REWARD, ROLLOUT, Hit, Kill, strike, usual_lengths
from tests.chaos.processes import wait_until_clean
from tests.chaos.run import TrainRun
from tests.chaos.scene import TRAIN_ITERS, write_config

MESSAGE_SECONDS = CLEAN_SECONDS = 60.0
RUN_SECONDS = 300.0
_NAME_OF = {DRIVER: "driver", ACTOR: "trainer rank", ROLLOUT: "rollout replica", REWARD: "reward worker"}
"""What a message must say for the worker to be named."""
_MAY_DIFFER = ("timing/", "tps", "memory", "replaced_replicas")
"""What a metric's name has in it that depends on the machine, or that counts the kills."""


@dataclass(frozen=True)
class Reference:
    """The undisturbed run of one setting, every save kept."""

    folder: Path
    usual_seconds: dict[str, float]


@dataclass
class Verdict:
    """One line of the table; `faults` is empty when all is well."""

    kill: Kill
    hit: Hit | None = None
    exit_code: int | None = None
    message: str = ""
    message_seconds: float | None = None
    clean_seconds: float | None = None
    save: int | None = None
    equal: bool = False
    faults: list[str] = field(default_factory=list)


def make_reference(scene: Path, setting: str, folder: Path) -> Reference:
    with TrainRun(write_config(scene, setting, folder, keep_last=0)) as run:
        seconds = usual_lengths(run)
        if run.wait(RUN_SECONDS) != 0:
            raise RuntimeError(f"the undisturbed run failed; see {folder / 'console.txt'}")
        _, left = wait_until_clean(run.footprint, CLEAN_SECONDS)
    if left:
        raise RuntimeError(f"the undisturbed run left {left}")
    return Reference(folder, seconds)


def judge(scene: Path, reference: Reference, kill: Kill, folder: Path, haste: float, seed: int) -> Verdict:
    """One kill and all that follows; `haste` divides how long is waited in the phase.

    keep_last 1: nothing but the last save stands between the run and its beginning.
    """
    verdict = Verdict(kill)
    config = write_config(scene, kill.setting, folder, keep_last=1)
    with TrainRun(config) as run:
        verdict.hit = strike(run, kill, reference.usual_seconds[kill.phase.name] / haste, random.Random(seed))
        if verdict.hit is None:
            verdict.faults.append("the moment did not come")
            return verdict
        check_end(verdict, run)
        check_left(verdict, run)
    check_save(verdict, folder, reference)
    if verdict.exit_code != 0:
        _resume(verdict, config)
    check_result(verdict, folder, reference)
    return verdict


def check_end(verdict: Verdict, run: TrainRun) -> None:
    """The run ends, in time and with one message that names the worker; or it goes on as if nothing had been."""
    kill = verdict.kill
    verdict.exit_code = run.wait(RUN_SECONDS)
    if verdict.exit_code is None:
        verdict.faults.append(f"still running {RUN_SECONDS:.0f} s after the kill")
        return
    if verdict.exit_code == 0 and kill.victim in (ROLLOUT, REWARD):
        return
    if verdict.exit_code == 0:
        verdict.faults.append(f"exit code 0 although the {kill.victim} died")
    # Of a driver that is killed others have to tell.
    run.console.wait_for_error(verdict.hit.when + MESSAGE_SECONDS)
    errors = run.console.errors()
    if len(errors) != 1:
        verdict.faults.append(f"{len(errors)} messages" if errors else f"no message within {MESSAGE_SECONDS:.0f} s")
    if errors:
        _check_message(verdict, *errors[0])


def _check_message(verdict: Verdict, when: float, message: str) -> None:
    verdict.message, verdict.message_seconds = message, when - verdict.hit.when
    if verdict.message_seconds > MESSAGE_SECONDS:
        verdict.faults.append(f"the message came after {verdict.message_seconds:.0f} s")
    if f"{_NAME_OF[verdict.kill.victim]} " not in message:
        verdict.faults.append("the message does not name the victim")
    if verdict.kill.victim in (DRIVER, ACTOR, ROLLOUT) and f"pid {verdict.hit.pid}" not in message:
        verdict.faults.append(f"the message does not name pid {verdict.hit.pid}")


def check_left(verdict: Verdict, run: TrainRun) -> None:
    footprint = run.footprint
    # The file comes with the first weights, and in the first iteration the victim may die before.
    is_early = verdict.hit is None or verdict.hit.iteration == 1
    if not (footprint.known and footprint.sockets and (footprint.memory_files or is_early)):
        raise RuntimeError(f"a run has processes, ports and a memory file; seen were {footprint}")
    waited_already = 0.0 if verdict.exit_code is not None else CLEAN_SECONDS
    # A minute after the end of the run, not after the kill: a run that survives goes on.
    verdict.clean_seconds, left = wait_until_clean(footprint, CLEAN_SECONDS - waited_already)
    verdict.faults += [f"left behind: {thing}" for thing in left]


def _tracked(folder: Path) -> int:
    tracker = folder / "save" / ITERATION_FILE
    return int(tracker.read_text()) if tracker.is_file() else 0


def check_save(verdict: Verdict, folder: Path, reference: Reference) -> None:
    """Every save that has its name is whole, and bit for bit the undisturbed run's; the message says which one to go on from."""
    verdict.save = _tracked(folder)
    saves = [int(path.name.removeprefix("iter_")) for path in sorted((folder / "save").glob("iter_*"))]
    if verdict.save not in (0, *saves):
        verdict.faults.append(f"{ITERATION_FILE} names iteration {verdict.save}, there are {saves}")
    # A run that was killed between its first save and the text file has a save that nothing names yet.
    last = verdict.save or max(saves, default=0)
    words = f"after iteration {last}:" if last else "from the beginning"
    if verdict.message and words not in verdict.message:
        verdict.faults.append(f"the message does not say {words!r}")
    for iteration in saves:
        try:
            verdict.faults += [f"save {iteration}: {text}" for text in _unlike_reference(folder, reference, iteration)]
        except (ValueError, OSError, KeyError) as error:
            verdict.faults.append(f"save {iteration} does not load: {error}")


def _unlike_reference(folder: Path, reference: Reference, iteration: int) -> list[str]:
    save = folder / "save" / f"iter_{iteration:07d}"
    state = json.loads((save / "state.json").read_text())
    if state["iteration"] != iteration:
        raise ValueError(f"state.json is of iteration {state['iteration']}")
    for name, tensor in read_weights(save).items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")
    return _differences(folder, reference, iteration)


def _resume(verdict: Verdict, config: Path) -> None:
    began = time.monotonic()
    with TrainRun(config, "rl_config.resume=auto") as run:
        code = run.wait(RUN_SECONDS)
        run.reader.join(timeout=5)
        if code != 0:
            said = "; ".join(line for _, line in run.console.errors())
            verdict.faults.append(f"the resumed run ended with {code} after {time.monotonic() - began:.0f} s: {said}")
        _, left = wait_until_clean(run.footprint, CLEAN_SECONDS)
    verdict.faults += [f"left behind by the resumed run: {thing}" for thing in left]


def check_result(verdict: Verdict, folder: Path, reference: Reference) -> None:
    if _tracked(folder) != TRAIN_ITERS:
        verdict.faults.append(f"the last save is of iteration {_tracked(folder)}, not {TRAIN_ITERS}")
        return
    differences = _differences(folder, reference, TRAIN_ITERS) + _metric_differences(folder, reference)
    verdict.equal = not differences
    verdict.faults += [f"at the end: {text}" for text in differences]


def all_tensors(actor: Path) -> dict[str, Tensor]:
    """Weights and optimizer state of a save that this test has made itself."""
    metadata = checkpoint.FileSystemReader(actor).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(stored.size, dtype=stored.properties.dtype)
        for key, stored in metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
    checkpoint.load(tensors, checkpoint_id=actor)
    return tensors


def _differences(folder: Path, reference: Reference, iteration: int) -> list[str]:
    own, theirs = (all_tensors(root / "save" / f"iter_{iteration:07d}" / "actor") for root in (folder, reference.folder))
    if own.keys() != theirs.keys():
        return [f"other tensors: {sorted(own.keys() ^ theirs.keys())[:3]}"]
    unequal = [name for name, tensor in own.items() if not torch.equal(tensor, theirs[name])]
    return [f"{len(unequal)} of {len(own)} tensors differ, such as {unequal[0]}"] if unequal else []


def _metric_differences(folder: Path, reference: Reference) -> list[str]:
    own, theirs = (read_records(root / "logs" / "metrics.jsonl") for root in (folder, reference.folder))
    if [record["iteration"] for record in own] != [record["iteration"] for record in theirs]:
        return [f"metrics are of iterations {[record['iteration'] for record in own]}"]
    unequal = sorted({
        name
        for mine, other in zip(own, theirs, strict=True)
        for name in mine.keys() | other.keys()
        if mine.get(name) != other.get(name) and not any(part in name for part in _MAY_DIFFER)
    })  # fmt: skip
    return [f"{len(unequal)} metrics differ, such as {unequal[:3]}"] if unequal else []
