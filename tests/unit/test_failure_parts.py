"""The parts that end a run: who is blamed and how, what a signal does, what the guardian and the launcher do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path

import pytest

from mindspeed_mm_rl.platforms import processes
from mindspeed_mm_rl.trainer.guardian import go_on
from mindspeed_mm_rl.workers import failure
from mindspeed_mm_rl.workers.calls import numbered
from mindspeed_mm_rl.workers.failure import Member

REPOSITORY = Path(__file__).parents[2]
KILLED = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits "
    "with a connection error code 2. End of file. Some common causes include: (1) the process was killed by the OOM killer due to high "
    "memory usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly due to SIGSEGV or another unexpected error."
)


@pytest.fixture
def member(tmp_path: Path) -> Member:
    return Member("rollout replica", 1, None, pid=812, node="10.0.0.3", log_folder=str(tmp_path), memory_kills=processes.memory_kills())


def test_a_worker_that_died_is_named_with_signal(member: Member) -> None:
    message = str(failure.died(member, "rollout", RuntimeError(KILLED)))
    assert message == "rollout replica 1 (pid 812 on 10.0.0.3) died in rollout: killed by signal 9 (SIGKILL)"


def test_a_crash_is_told_from_a_kill_by_what_the_worker_wrote(member: Member, tmp_path: Path) -> None:
    (tmp_path / "python-core-worker-ab12_812.log").write_text("[E 1 1] logging.cc:474: *** SIGSEGV received at time=17 on cpu 1 ***\n")
    (tmp_path / "worker-ab12-01-812.err").write_text("a last word\n")
    died = failure.died(member, "rollout", RuntimeError(KILLED))
    assert str(died).endswith("died in rollout: killed by signal 11 (SIGSEGV)")
    assert died.log == "a last word"


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("Worker exits with an exit code 1. The process receives a SIGTERM.", "killed by signal 15 (SIGTERM)"),
        ("Worker exits unexpectedly. Worker exits with an exit code 7.", "it ended with exit code 7"),
        (
            "Task was killed due to the node running low on memory.",
            "out of memory: Ray ended it because its machine had little memory left; "
            "lower generate_config.max_num_seqs or generate_config.kv_cache_bytes",
        ),
        (
            "The actor died because its node has died. Node Id: 65\n\tthe actor's node was terminated expectedly: received SIGTERM",
            "its machine left the run: Ray on it was told to end",
        ),
        (
            "The actor died because its node has died. Node Id: 65\n\tthe actor's node was terminated unexpectedly: health check failed",
            "its machine is gone, or Ray on it",
        ),
    ],
)
def test_the_cause_of_a_death(member: Member, said: str, cause: str) -> None:
    assert str(failure.died(member, "weight push", RuntimeError(said))).endswith(f"died in weight push: {cause}")


def test_a_worker_whose_machine_is_gone_is_not_replaced(member: Member) -> None:
    assert isinstance(failure.died(member, "rollout", RuntimeError(KILLED)), failure.WorkerDied)
    assert not isinstance(failure.died(member, "rollout", RuntimeError("because its node has died")), failure.WorkerDied)


def test_the_kernel_killing_for_memory_is_told(member: Member) -> None:
    before = Member(member.role, 1, None, 812, member.node, member.log_folder, memory_kills=-1)
    assert processes.memory_kills() is not None
    assert "out of memory: the kernel killed it by signal 9" in str(failure.died(before, "rollout", RuntimeError(KILLED)))


def test_an_exception_of_a_worker_is_told_by_its_first_sentence(member: Member) -> None:
    told = failure.raised(member, "update", RuntimeError("the gradient is not finite.\nlong\nstory"))
    assert str(told) == "rollout replica 1 (pid 812 on 10.0.0.3) failed in update: the gradient is not finite"
    assert isinstance(told, failure.WorkerFailed)
    assert isinstance(failure.raised(member, "start", ValueError("no such folder")), ValueError), "for the user to mend"
    assert failure.first_sentence(KeyError("x")) == "KeyError: 'x'"


def test_no_memory_and_no_disk_are_called_so() -> None:
    allocation = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
    )
    told = failure.cause_of(allocation, "trainer rank")
    assert told.startswith("out of memory: [enforce fail") and told.endswith("; lower rl_config.max_packing_token_size")
    assert failure.cause_of(OSError(28, "No space left on device", "/x")).startswith("the disk is full: [Errno 28] No space left on device")


def test_ranks_that_only_miss_a_peer_are_known() -> None:
    assert failure.blames_others(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:43"))
    assert failure.blames_others(RuntimeError("Timed out waiting 10000ms for recv operation to complete"))
    assert not failure.blames_others(RuntimeError("the optimizer skipped a step"))
    assert not failure.blames_others(ValueError("connection refused is what the user's text says"))


def test_numbers_are_counted_where_they_are_many() -> None:
    assert numbered("samples", [8, 9]) == "samples 8, 9"
    assert numbered("samples", list(range(8, 20))) == "samples 8, 9, 10, 11, 12, ... (12 in all)"


def test_going_on_without_any_save(tmp_path: Path) -> None:
    assert "actor_config.save is not set" in go_on("")
    assert go_on(str(tmp_path)) == f"There is no save in {tmp_path} yet: the same command starts from the beginning"


def test_a_stopped_process_of_the_run_is_found_and_ended() -> None:
    marker = uuid.uuid4().hex
    marked = subprocess.Popen(["sleep", "60"], env=os.environ | {processes.RUN_MARKER: marker})
    other = subprocess.Popen(["sleep", "60"], env=os.environ | {processes.RUN_MARKER: f"{marker}7"})
    try:
        marked.send_signal(signal.SIGSTOP)
        end = time.monotonic() + 10
        while not processes.is_stopped(marked.pid):
            assert time.monotonic() < end
        assert processes.of_run(marker) == [marked.pid]
        assert processes.end_all(marker, spared=[marked.pid], within_seconds=5) == []
        assert processes.is_stopped(marked.pid), "spared"
        assert processes.end_all(marker, spared=[], within_seconds=5) == []
        assert marked.wait(5) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        for process in (marked, other):
            process.kill()
            process.wait()


DRIVER = """
import subprocess, sys, time
from mindspeed_mm_rl.platforms import signals
from mindspeed_mm_rl.trainer.guardian import Guardian
signals.stop_on_signals()
try:
    with Guardian(sys.argv[1]) as guardian:
        child = subprocess.Popen(["sleep", "60"], start_new_session=True)
        print(child.pid, flush=True)
        time.sleep(60)
except signals.StoppedBySignal as stop:
    print(stop, file=sys.stderr)
    sys.exit(stop.exit_code)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_whatever_ends_the_driver_its_processes_go_too(number: signal.Signals, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    child = int(driver.stdout.readline())
    driver.send_signal(number)
    # The pipe is closed when driver and guardian are gone.
    _, told = driver.communicate(timeout=30)
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text()
    if number == signal.SIGKILL:
        assert re.match(rf"error: the driver \(pid {driver.pid} on .*\) ended without a word: .*\. There is no save in {tmp_path}", told)
    else:
        assert driver.returncode == 128 + number
        assert told == f"stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}\n"


HELD = """
import os, signal, sys
from mindspeed_mm_rl.platforms import signals
signals.stop_on_signals()
try:
    with signals.held():
        os.kill(os.getpid(), signal.SIGTERM)
        print("noted", flush=True)
        if sys.argv[1] == "wait":
            signals.let_through()
            print("never", flush=True)
        if sys.argv[1] == "error":
            raise ValueError("the trainer is gone")
    print("never", flush=True)
except signals.StoppedBySignal as stop:
    print(repr(stop.__context__), flush=True)
    sys.exit(stop.exit_code)
"""


@pytest.mark.parametrize("ends_by, context", [("wait", "None"), ("end", "None"), ("error", "ValueError('the trainer is gone')")])
def test_a_signal_waits_for_a_place_where_it_breaks_nothing(ends_by: str, context: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", HELD, ends_by], env=environment, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (143, f"noted\n{context}\n", "")


STAND_IN = """
#!/usr/bin/env bash
# In place of mm-rl: writes down how it is called; its exit codes are the words of CODES.
echo "$*" >> "$CALLS"
read -ra codes <<< "$CODES"
code="${codes[$(($(wc -l < "$CALLS") - 1))]}"
if [[ "$code" == wait ]]; then sleep 30 &> /dev/null & trap 'kill $!; exit 143' TERM; wait $!; fi
exit "$code"
"""


@pytest.fixture
def launcher(tmp_path: Path) -> dict[str, str]:
    """The environment of a launch script that finds a stand-in for mm-rl."""
    program = tmp_path / "mm-rl"
    program.write_text(textwrap.dedent(STAND_IN).lstrip())
    program.chmod(0o750)
    calls = {"CALLS": str(tmp_path / "calls"), "VIRTUAL_ENV": "any"}
    return {name: value for name, value in os.environ.items() if name != "NNODES"} | calls | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def launch(environment: dict[str, str], codes: str, restarts: str) -> tuple[subprocess.Popen[str], list[str]]:
    command = ["bash", str(REPOSITORY / "examples/rl/scripts/grpo_trainer_qwen25vl_tiny.sh"), "rl_config.epochs=2"]
    launched = subprocess.Popen(
        command, env=environment | {"CODES": codes, "MAX_RESTARTS": restarts}, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    return launched, command


@pytest.mark.parametrize(
    ("codes", "restarts", "code", "runs"),
    [
        ("0", "3", 0, 1),
        ("1 1", "0", 1, 1),
        ("1 137 0", "3", 0, 3),
        ("1 1 1 1", "2", 1, 3),
        ("2 0", "3", 2, 1),
        ("130 0", "3", 130, 1),
        ("143 0", "3", 143, 1),
    ],
)
def test_the_launcher_brings_a_failed_run_back(launcher: dict[str, str], codes: str, restarts: str, code: int, runs: int) -> None:
    launched, _ = launch(launcher, codes, restarts)
    _, told = launched.communicate(timeout=60)
    calls = Path(launcher["CALLS"]).read_text().splitlines()
    assert (launched.returncode, len(calls)) == (code, runs)
    assert calls[0].endswith(" rl_config.epochs=2")
    assert all(call.endswith(" rl_config.epochs=2 rl_config.resume=auto") for call in calls[1:])
    assert told.count("restart ") == runs - 1
    assert ("MAX_RESTARTS=2 is used up" in told) == (codes == "1 1 1 1")


def test_the_launcher_passes_a_signal_on_and_does_not_restart(launcher: dict[str, str]) -> None:
    launched, _ = launch(launcher, "wait 0", "3")
    calls, end = Path(launcher["CALLS"]), time.monotonic() + 30
    while not calls.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.5)
    launched.terminate()
    launched.communicate(timeout=20)
    assert (launched.returncode, len(calls.read_text().splitlines())) == (143, 1)
