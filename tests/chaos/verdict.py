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

from mindspeed_mm_rl.config.schema import RLConfig
from mindspeed_mm_rl.models.weight_files import ITERATION_FILE, read_weights, recognise
from mindspeed_mm_rl.sinks import read_records
from tests.chaos.moments import ACTOR, DRIVER, REWARD, ROLLOUT, Hit, Kill, strike, usual_lengths
from tests.chaos.processes import wait_until_clean
from tests.chaos.run import TrainRun
from tests.chaos.scene import TRAIN_ITERS, write_config

MESSAGE_SECONDS = CLEAN_SECONDS = 60.0
_RUN_SECONDS = 300.0
_NAMES_OF = {ACTOR: ("trainer", "actor"), ROLLOUT: ("rollout",), REWARD: ("reward",)}
"""What a message must say for the worker to be named."""
_MACHINE_DEPENDENT = ("timing/", "tps", "memory")


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
        if run.wait(_RUN_SECONDS) != 0:
            raise RuntimeError(f"the undisturbed run failed; see {folder / 'console.txt'}")
        _, left = wait_until_clean(run.footprint, CLEAN_SECONDS)
    if left:
        raise RuntimeError(f"the undisturbed run left {left}")
    return Reference(folder, seconds)


def judge(scene: Path, reference: Reference, kill: Kill, folder: Path, seed: int) -> Verdict:
    """One kill and all that follows. keep_last 1: nothing but the last save stands between the run and its beginning."""
    verdict = Verdict(kill)
    config = write_config(scene, kill.setting, folder, keep_last=1)
    with TrainRun(config) as run:
        verdict.hit = strike(run, kill, reference.usual_seconds[kill.phase.name], random.Random(seed))
        if verdict.hit is None:
            verdict.faults.append("the moment did not come")
            return verdict
        _check_end(verdict, run)
        _check_left(verdict, run)
    _check_save(verdict, folder, reference)
    if verdict.exit_code != 0:
        _resume(verdict, config)
    _check_result(verdict, folder, reference)
    return verdict


def _check_end(verdict: Verdict, run: TrainRun) -> None:
    kill, hit = verdict.kill, verdict.hit
    verdict.exit_code = run.wait(_RUN_SECONDS)
    run.reader.join(timeout=5)
    if verdict.exit_code is None:
        verdict.faults.append(f"still running {_RUN_SECONDS:.0f} s after the kill")
        return
    if kill.victim == DRIVER or (verdict.exit_code == 0 and kill.victim in (ROLLOUT, REWARD)):
        return
    if verdict.exit_code == 0:
        verdict.faults.append("exit code 0 although a trainer process died")
    error = run.console.error()
    if error is None:
        verdict.faults.append("no message")
        return
    when, verdict.message = error
    verdict.message_seconds = when - hit.when
    if verdict.message_seconds > MESSAGE_SECONDS:
        verdict.faults.append(f"the message came after {verdict.message_seconds:.0f} s")
    if not any(name in verdict.message.lower() for name in _NAMES_OF[kill.victim]):
        verdict.faults.append(f"the message does not name the {kill.victim}: {verdict.message}")


def _check_left(verdict: Verdict, run: TrainRun) -> None:
    waited_already = 0.0 if verdict.exit_code is not None else CLEAN_SECONDS
    # A minute after the end of the run, not after the kill: a run that survives goes on.
    verdict.clean_seconds, left = wait_until_clean(run.footprint, CLEAN_SECONDS - waited_already)
    verdict.faults += [f"left behind: {thing}" for thing in left]


def _tracked(folder: Path) -> int:
    tracker = folder / "save" / ITERATION_FILE
    return int(tracker.read_text()) if tracker.is_file() else 0


def _check_save(verdict: Verdict, folder: Path, reference: Reference) -> None:
    """The save that the tracker names is whole, and bit for bit the undisturbed run's of that iteration."""
    verdict.save = _tracked(folder)
    if verdict.save == 0:
        return
    try:
        found = recognise(folder / "save")
        for tensor in read_weights(folder / "save").values():
            if not tensor.isfinite().all():
                raise ValueError("a weight is not finite")
        state = json.loads((found.weights.parent / "state.json").read_text())
        if state["iteration"] != verdict.save:
            raise ValueError(f"state.json is of iteration {state['iteration']}")
        verdict.faults += [f"save {verdict.save}: {text}" for text in _differences(folder, reference, verdict.save)]
    except (ValueError, OSError, KeyError) as error:
        verdict.faults.append(f"save {verdict.save} does not load: {error}")


def _resume(verdict: Verdict, config: Path) -> None:
    began = time.monotonic()
    with TrainRun(config, *_resume_overrides(config.parent)) as run:
        code = run.wait(_RUN_SECONDS)
        run.reader.join(timeout=5)
        if code != 0:
            error = run.console.error()
            verdict.faults.append(f"the resumed run ended with {code} after {time.monotonic() - began:.0f} s: {error[1] if error else ''}")
        _, left = wait_until_clean(run.footprint, CLEAN_SECONDS)
    verdict.faults += [f"left behind by the resumed run: {thing}" for thing in left]


def _resume_overrides(folder: Path) -> list[str]:
    if "resume" in RLConfig.model_fields:
        return ["rl_config.resume=auto"]
    return [f"actor_config.load={folder / 'save'}"] if _tracked(folder) else []


def _check_result(verdict: Verdict, folder: Path, reference: Reference) -> None:
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
    checkpoint.load(tensors, checkpoint_id=actor, no_dist=True)
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
        if mine.get(name) != other.get(name) and not any(part in name for part in _MACHINE_DEPENDENT)
    })  # fmt: skip
    return [f"{len(unequal)} metrics differ, such as {unequal[:3]}"] if unequal else []
