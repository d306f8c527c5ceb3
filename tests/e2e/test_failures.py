"""What happens when something dies, is stopped, or is told to stop: one message in time, the way to go on, and nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mindspeed_mm_rl.sinks import read_records
from tests.chaos.processes import Process, read_process
from tests.chaos.run import TrainRun
from tests.chaos.scene import TRAIN_ITERS, make_scene, write_config

ACTOR, ROLLOUT = "ray::ActorWorker", "ray::RolloutWorker"
_START_SECONDS, _END_SECONDS = 240.0, 60.0
_TWO_ITERATIONS = "megatron_training.train_iters=2"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scene(tmp_path_factory.mktemp("scene"))


def wait_until(run: TrainRun, holds: Callable[[], object], seconds: float = _START_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert not run.is_over, f"the run was over before its time:\n{console(run)}"
        assert time.monotonic() < end, console(run)
        time.sleep(0.001)


def console(run: TrainRun) -> str:
    return "\n".join(line for _, line in run.console.lines)


def workers(run: TrainRun, title: str) -> list[int]:
    return sorted(process.pid for process in run.footprint.look() if process.title.startswith(title))


def at_work(run: TrainRun, pid: int, verb: str) -> bool:
    process: Process | None = read_process(pid)
    return process is not None and process.title.endswith(f".{verb}")


def send_during(run: TrainRun, title: str, verb: str, number: signal.Signals) -> int:
    """To the last worker of a kind, in the second iteration, while it does `verb`; returns its pid."""
    wait_until(run, lambda: run.iterations_done() >= 1)
    pid = workers(run, title)[-1]
    wait_until(run, lambda: at_work(run, pid, verb))
    os.kill(pid, number)
    return pid


def ended(run: TrainRun, within_seconds: float = _END_SECONDS) -> tuple[int | None, str]:
    """Exit code and the last line; nothing is left a moment later."""
    code = run.wait(within_seconds)
    left, end = ["not looked yet"], time.monotonic() + 10
    while left and time.monotonic() < end:
        left = run.footprint.left()
    assert not left
    assert not list(Path("/tmp/ray").glob(f"session_*_{run.driver.pid}"))
    run.reader.join(timeout=10)
    return code, run.console.lines[-1][1]


def goes_on_from(run: TrainRun, iteration: int) -> str:
    save = re.escape(str(run.save / f"iter_{iteration:07d}"))
    return rf"To go on after iteration {iteration}: the same command with rl_config\.resume=auto \(it continues {save}\)"


def test_a_rollout_replica_that_dies_is_replaced_and_nothing_else_changes(scene: Path, tmp_path: Path) -> None:
    """The weights that it gets again come from the trainer, which has no copy of them; those of the other run went through the host."""
    with TrainRun(write_config(scene, "grpo", tmp_path / "undisturbed", keep_last=1), _TWO_ITERATIONS) as undisturbed:
        assert undisturbed.wait(_START_SECONDS) == 0, console(undisturbed)
    config = write_config(scene, "grpo", tmp_path / "disturbed", keep_last=1)
    with TrainRun(config, _TWO_ITERATIONS, "generate_config.weight_carrier=device") as run:
        pid = send_during(run, ROLLOUT, "generate", signal.SIGKILL)
        code, _ = ended(run, _START_SECONDS)
    assert code == 0, console(run)
    assert re.search(rf"rollout replica \d \(pid {pid} on .*killed by signal 9 \(SIGKILL\).*replaced by pid \d+ \(1 of 3\)", console(run))
    left, right = (read_records(r.metrics) for r in (undisturbed, run))
    assert [record["rollout/replaced_replicas"] for record in left + right] == [0, 0, 0, 1]
    for a, b in zip(left, right, strict=True):
        compared = {name for name in a if not name.startswith(("timing/", "memory/")) and not name.endswith(("tps", "replaced_replicas"))}
        assert {name: a[name] for name in compared} == {name: b[name] for name in compared}
    shards = [sorted((r.save / "iter_0000002" / "actor").glob("*.distcp")) for r in (undisturbed, run)]
    assert len(shards[0]) == len(shards[1]) > 0
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*shards, strict=True)), "weights and optimizer, bit for bit"


def test_a_trainer_rank_that_dies_ends_the_run_with_one_sentence(scene: Path, tmp_path: Path) -> None:
    """The other rank only says that a connection was closed; it is not the one to be named."""
    with TrainRun(write_config(scene, "dapo", tmp_path, keep_last=2)) as run:
        pid = send_during(run, ACTOR, "update", signal.SIGKILL)
        code, last = ended(run)
    assert code == 1
    died = rf"trainer rank \d \(pid {pid} on .*\) died in update: killed by signal 9 \(SIGKILL\)"
    assert re.match(rf"error: {died}.*; it was iteration 2 of {TRAIN_ITERS}\. {goes_on_from(run, 1)}", last), last
    assert console(run).count("killed by") == 1
    assert f"pid {pid}" in (tmp_path / "logs" / "failures.log").read_text()


def test_a_stopped_trainer_rank_is_named_when_the_bound_is_over(scene: Path, tmp_path: Path) -> None:
    with TrainRun(write_config(scene, "grpo", tmp_path, keep_last=2), "rl_config.timeout_seconds=8") as run:
        pid = send_during(run, ACTOR, "update", signal.SIGSTOP)
        code, last = ended(run)
    assert code == 1
    silent = (
        rf"no answer within 8 s \(rl_config\.timeout_seconds\) from trainer rank \d \(pid {pid} on [^;]*\), which is stopped \(SIGSTOP\)"
    )
    assert re.match(rf"error: update waits in vain: {silent}, with samples \d+, .*; it was iteration 2 of {TRAIN_ITERS}\. ", last), last
    assert re.search(goes_on_from(run, 1), last)


def test_sigterm_ends_the_run_with_143(scene: Path, tmp_path: Path) -> None:
    with TrainRun(write_config(scene, "grpo", tmp_path, keep_last=2)) as run:
        wait_until(run, lambda: run.iterations_done() >= 1)
        os.kill(run.driver.pid, signal.SIGTERM)
        code, last = ended(run)
    assert code == 143
    assert re.match(rf"stopped by SIGTERM; it was iteration \d of {TRAIN_ITERS}\. (To go on after iteration \d|There is no save)", last), (
        last
    )
    assert "Traceback" not in console(run)


def test_a_killed_driver_takes_everything_with_it(scene: Path, tmp_path: Path) -> None:
    """Also a worker that is stopped, which no other signal would reach."""
    with TrainRun(write_config(scene, "grpo", tmp_path, keep_last=2)) as run:
        wait_until(run, (run.save / "iter_0000001").is_dir)
        os.kill(workers(run, ACTOR)[0], signal.SIGSTOP)
        run.driver.kill()
        code, last = ended(run)
    assert code == -signal.SIGKILL
    assert re.match(rf"error: the driver \(pid {run.driver.pid} on .*\) ended without a word: killed by signal 9 \(SIGKILL\)", last), last
    assert re.search(r"every process of the run was ended\. To go on after iteration \d: the same command", last), last
