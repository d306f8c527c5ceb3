"""What a run owns on this machine, read from /proc: processes, listening ports, shared memory. Nothing of the product is asked.

A run's processes carry a marker in their environment; Ray writes titles over the environment of some, so descendants of the driver count
too, and a process once seen stays known by its pid and start time however it is reparented.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

MARKER = "MM_RL_CHAOS_RUN"
PROC, SHM = Path("/proc"), Path("/dev/shm")
_LISTENING = "0A"
_GONE = (FileNotFoundError, ProcessLookupError, PermissionError)
"""What reading /proc raises when the process ends meanwhile, or belongs to somebody else."""


@dataclass(frozen=True)
class Process:
    """Example: Process(pid=812, started=90210, parent=800, state="S", title="ray::ActorWorker.update")."""

    pid: int
    started: int
    """Clock ticks after boot: tells a process from a later one with the same pid."""
    parent: int
    state: str
    title: str

    @property
    def key(self) -> tuple[int, int]:
        return self.pid, self.started


def read_process(pid: int) -> Process | None:
    try:
        title = (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        # The name in parentheses may hold spaces and parentheses itself.
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except _GONE:
        return None
    return Process(pid, int(fields[19]), int(fields[1]), fields[0], title)


def all_processes() -> list[Process]:
    return [process for name in os.listdir(PROC) if name.isdigit() and (process := read_process(int(name)))]


def _has_marker(pid: int, marker: str) -> bool:
    try:
        return f"{MARKER}={marker}".encode() in (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except _GONE:
        return False


def _links(pid: int) -> Iterator[tuple[Path, str]]:
    """Open files of a process: (the entry, what it points at)."""
    try:
        entries = list((PROC / str(pid) / "fd").iterdir())
    except _GONE:
        return
    for entry in entries:
        try:
            yield entry, os.readlink(entry)
        except _GONE:
            continue


def listening() -> dict[str, int]:
    """Inode of every listening TCP socket of this machine -> port."""
    ports = {}
    for table in ("tcp", "tcp6"):
        for line in (PROC / "net" / table).read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == _LISTENING:
                ports[columns[9]] = int(columns[1].rpartition(":")[2], 16)
    return ports


def shared_memory_names() -> set[str]:
    return {path.relative_to(SHM).as_posix() for path in SHM.rglob("*")}


@dataclass
class Footprint:
    """All that one run has been seen to own since it was started."""

    marker: str
    shm_before: set[str]
    known: dict[tuple[int, int], Process] = field(default_factory=dict)
    sockets: dict[str, int] = field(default_factory=dict)
    memory_files: set[int] = field(default_factory=set)
    """Inodes of memfds."""

    def processes(self) -> list[Process]:
        """Those that are alive; they are known from now on."""
        everyone = all_processes()
        ours = {process.pid for process in everyone if process.key in self.known or _has_marker(process.pid, self.marker)}
        while more := {process.pid for process in everyone if process.parent in ours} - ours:
            ours |= more
        # A zombie holds nothing but its number, until whoever adopted it asks.
        alive = [process for process in everyone if process.pid in ours and process.state != "Z"]
        self.known |= {process.key: process for process in alive}
        return alive

    def look(self) -> list[Process]:
        """Takes stock of what they hold, too. Call it while the run is still whole."""
        alive, ports = self.processes(), listening()
        for process in alive:
            self._take_stock(process.pid, ports)
        return alive

    def _take_stock(self, pid: int, ports: dict[str, int]) -> None:
        for entry, target in _links(pid):
            if target.startswith("socket:["):
                inode = target[len("socket:[") : -1]
                if inode in ports:
                    self.sockets[inode] = ports[inode]
            elif target.startswith("/memfd:"):
                try:
                    self.memory_files.add(entry.stat().st_ino)
                except _GONE:
                    continue

    def left(self) -> list[str]:
        """What there still is of the run, in words."""
        alive = self.look()
        found = [f"process {process.pid} ({process.title[:60]})" for process in alive]
        ports = listening()
        found += [f"port {port}" for inode, port in self.sockets.items() if ports.get(inode) == port]
        others = [p.pid for p in all_processes() if p.key not in {q.key for q in alive}]
        found += [f"memfd held by process {pid}" for pid in others if self._holds_memory(pid)]
        new = shared_memory_names() - self.shm_before
        if new:
            # Entries that a living process of somebody else has open are not of this run.
            new -= _held_by(others)
        return found + [f"/dev/shm/{name}" for name in sorted(new)]

    def _holds_memory(self, pid: int) -> bool:
        for entry, target in _links(pid):
            if target.startswith("/memfd:"):
                try:
                    if entry.stat().st_ino in self.memory_files:
                        return True
                except _GONE:
                    continue
        return False

    def end(self) -> None:
        """Kills what is left of this run, so that the next one has the machine to itself."""
        for process in self.processes():
            send(process.pid, signal.SIGKILL)


def _held_by(pids: Iterable[int]) -> set[str]:
    held = set()
    for pid in pids:
        held |= {target[len(f"{SHM}/") :] for _, target in _links(pid) if target.startswith(f"{SHM}/")}
        try:
            maps = (PROC / str(pid) / "maps").read_text()
        except _GONE:
            continue
        held |= {line.partition(f"{SHM}/")[2] for line in maps.splitlines() if f"{SHM}/" in line}
    return held


def send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def wait_until_clean(footprint: Footprint, seconds: float) -> tuple[float, list[str]]:
    """Seconds until nothing was left, or what was left when the time was over."""
    began = time.monotonic()
    while True:
        left = footprint.left()
        passed = time.monotonic() - began
        if not left or passed >= seconds:
            return passed, left
        time.sleep(0.5)
