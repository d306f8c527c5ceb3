"""The chaos test looks for what a run leaves behind: each kind of thing must be found, or that test could not fail."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.chaos.moments import DRIVER, LAST_ITERATION, PHASES, VICTIMS, plan_kills
from tests.chaos.processes import MARKER, Footprint, shared_memory_names, wait_until_clean
from tests.chaos.stepping import led_while

READY = "\nprint('ready', flush=True)\nimport sys\nsys.stdin.read()\n"


@contextmanager
def child(code: str, marker: str) -> Iterator[subprocess.Popen[str]]:
    """A process of a run, up to the moment when it says so."""
    command = [sys.executable, "-S", "-c", code + READY]
    environment = os.environ | {MARKER: marker}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.fixture
def footprint() -> Footprint:
    return Footprint(uuid.uuid4().hex, shared_memory_names())


def test_a_process_is_found_by_its_marker_and_gone_after_its_end(footprint):
    with child("", footprint.marker) as process:
        assert [found.split(" (")[0] for found in footprint.left()] == [f"process {process.pid}"]
    assert footprint.left() == []


def test_a_process_without_the_marker_is_found_by_its_parent_and_known_when_orphaned(footprint):
    sleeper = "[sys.executable, '-S', '-c', 'import time; time.sleep(60)']"
    code = f"import subprocess, sys\nprint(subprocess.Popen({sleeper}, env={{}}).pid, flush=True)"
    environment = os.environ | {MARKER: footprint.marker}
    with subprocess.Popen([sys.executable, "-c", code + READY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as parent:
        orphan = int(parent.stdout.readline())
        assert {process.pid for process in footprint.look()} == {parent.pid, orphan}
        parent.kill()
    assert [found.split(" (")[0] for found in footprint.left()] == [f"process {orphan}"]
    footprint.end()
    assert wait_until_clean(footprint, 5.0)[1] == []


def test_a_listening_port_is_found(footprint):
    with child("import socket\ns = socket.create_server(('127.0.0.1', 0))", footprint.marker) as process:
        found = footprint.left()
        assert any(thing.startswith("port ") for thing in found) and len(found) == 2, found
        process.kill()
        process.wait()
        assert footprint.left() == []


def test_a_memory_file_kept_by_somebody_else_is_found(footprint):
    with child("import os\nassert os.memfd_create('weights') == 3", footprint.marker) as process:
        footprint.look()
        held = os.open(f"/proc/{process.pid}/fd/3", os.O_RDWR)
        process.kill()
        process.wait()
        assert footprint.left() == [f"memfd held by process {os.getpid()}"]
        os.close(held)
        assert footprint.left() == []


def test_a_new_name_in_shared_memory_is_found(footprint):
    path = Path("/dev/shm") / f"chaos_{footprint.marker}"
    path.write_text("left")
    try:
        assert footprint.left() == [str(path)]
        # Somebody's who is alive and has it open: not of the run.
        with path.open():
            assert footprint.left() == []
    finally:
        path.unlink()


def test_a_moment_between_two_system_calls_is_not_missed(tmp_path):
    long, short = tmp_path / "long", tmp_path / "short"
    code = f"import os, sys\nsys.stdin.read()\nopen({str(long)!r}, 'w').close()\nos.rename({str(long)!r}, {str(short)!r})"
    command = [sys.executable, "-S", "-c", f"{code}\nos.unlink({str(short)!r})"]

    def goes_on() -> bool:
        # Asked when it is led: only then does it begin.
        process.stdin.close()
        return not short.exists()

    with subprocess.Popen(command, stdin=subprocess.PIPE) as process, led_while(process.pid, goes_on):
        assert [path.name for path in tmp_path.iterdir()] == ["short"]
    assert process.returncode == 0 and not short.exists()


def test_the_first_kills_differ_and_all_pairs_come():
    kills = plan_kills(len(VICTIMS) * len(PHASES), 0, ("dapo", "grpo"))
    assert {(kill.victim, kill.phase.name) for kill in kills} == {(victim, phase.name) for victim in VICTIMS for phase in PHASES}
    assert kills == plan_kills(len(kills), 0, ("dapo", "grpo")) != plan_kills(len(kills), 1, ("dapo", "grpo"))
    assert all(kill.phase.first_iteration <= kill.iteration <= LAST_ITERATION for kill in kills)
    assert {kill.victim for kill in kills if kill.setting == "grpo"} == set(VICTIMS) and DRIVER in VICTIMS
