"""What the operating system says of processes (Linux), and which of them belong to one run."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Collection
from pathlib import Path

RUN_MARKER = "MM_RL_RUN"
"""Environment variable that every process of a run inherits: parents come and go (orphans belong to init), this stays."""
NODE_MARKER = "MM_RL_NODE"
"""The same for all that `mm-rl node` starts on one machine; its value is the folder of that machine's Ray."""
PROCESS_ENV = {
    # Without it a process that gives itself a title writes over its environment, and with it the marker.
    "SPT_NOENV": "1"
}
_PROC = Path("/proc")
_GONE = (FileNotFoundError, ProcessLookupError, PermissionError)
"""Reading /proc raises these when the process has ended meanwhile or is somebody else's."""
_LOOK_SECONDS = 0.2
_ONLY_THE_PEAK = "5"
"""What clear_refs is to clear, see proc(5)."""


def of_run(marker: str, variable: str = RUN_MARKER) -> list[int]:
    """Ids of living processes that carry this marker, the caller itself never among them."""
    entry = f"{variable}={marker}".encode()
    return [int(path.name) for path in _PROC.iterdir() if path.name.isdigit() and int(path.name) != os.getpid() and _holds(path, entry)]


def _holds(process: Path, entry: bytes) -> bool:
    try:
        return entry in (process / "environ").read_bytes().split(b"\0") and _state(process) not in "ZX"
    except _GONE:
        return False


def end_all(marker: str, spared: Collection[int], within_seconds: float, variable: str = RUN_MARKER) -> list[int]:
    """Kills every process of the run but `spared`, again and again, for a dying one may still start others; returns those that are left."""
    deadline = time.monotonic() + within_seconds
    while (left := [pid for pid in of_run(marker, variable) if pid not in spared]) and time.monotonic() < deadline:
        for pid in left:
            kill(pid)
        time.sleep(_LOOK_SECONDS)
    return left


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def name_of(pid: int) -> str:
    """Of the program that a process runs, its first 15 characters; empty when it has ended."""
    try:
        return (_PROC / str(pid) / "comm").read_text().strip()
    except _GONE:
        return ""


def is_stopped(pid: int) -> bool:
    """Whether a process of this machine was stopped by a signal (SIGSTOP, a debugger)."""
    try:
        return _state(_PROC / str(pid)) in "tT"
    except _GONE:
        return False


def _state(process: Path) -> str:
    # The name before it stands in parentheses and may hold spaces and parentheses itself.
    return (process / "stat").read_text().rpartition(")")[2].split()[0]


def memory_kills() -> int | None:
    """How many processes the kernel has killed for want of memory since boot; None where it doesn't say."""
    try:
        counters = dict(line.split() for line in (_PROC / "vmstat").read_text().splitlines())
    except _GONE:
        return None
    return int(counters["oom_kill"]) if "oom_kill" in counters else None


def peak_resident_bytes() -> int:
    """The largest resident set of this process since `reset_peak_resident`, pages that it shares with others included."""
    sizes = dict(line.split(":", 1) for line in (_PROC / "self/status").read_text().splitlines())
    # Some sandboxes don't keep the peak.
    return int(sizes.get("VmHWM", sizes["VmRSS"]).split()[0]) * 1024


def reset_peak_resident() -> None:
    """Where the kernel has no such reset, the peak stays that of the process's whole life."""
    with contextlib.suppress(OSError):
        (_PROC / "self/clear_refs").write_text(_ONLY_THE_PEAK)


def remove_ray_session(folder: Path) -> None:
    """Ray keeps the logs and sockets of every session for ever, and a link to the last one."""
    latest = folder.parent / "session_latest"
    if latest.is_symlink() and latest.readlink().name == folder.name:
        latest.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
