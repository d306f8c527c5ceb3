"""Two machines that are both this one: the second has another address of it, and Ray daemons of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest

from mindspeed_mm_rl.platforms import network
from tests.addresses import free_address
from tests.chaos.processes import MARKER, Footprint, shared_memory_names

REPOSITORY = Path(__file__).parents[1]
SECOND = "127.0.0.2"
NODE = [sys.executable, "-m", "mindspeed_mm_rl.cli.main", "node", "--"]


def own_address() -> str:
    """One that other machines would see."""
    found = [address for address in network.by_interface().values() if not network.is_loopback(address)]
    if not found:
        pytest.skip("this machine has no address but its loopback")
    return found[0]


class TwoMachines:
    """A context: the head's process and the other's, started by `run`; what is left of them at the end is killed, by pid."""

    def __init__(self, folder: Path, **variables: str) -> None:
        """folder: of the working directory and the consoles."""
        self.folder, self.address = folder, own_address()
        # Ray keeps sockets in its folder, whose path must be short.
        self.ray_folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
        self.marker = uuid.uuid4().hex
        self.variables = {
            MARKER: self.marker,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "NNODES": "2",
            "NPUS_PER_NODE": "1",
            "MASTER_ADDR": self.address,
            "RAY_PORT": free_address().rpartition(":")[2],
            "RAY_TMPDIR": str(self.ray_folder),
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "WAIT_SECONDS": "400",
        } | variables

    def __enter__(self) -> TwoMachines:
        self.footprint = Footprint(self.marker, shared_memory_names())
        return self

    def run(self, *command: str) -> None:
        """The same command on both."""
        self.head = self.start("head", command, CURRENT_IP=self.address)
        self.other = self.start("other", command, CURRENT_IP=SECOND, NODE_RANK="1")

    def start(self, name: str, command: Sequence[str], **variables: str) -> subprocess.Popen[bytes]:
        without = {"RAY_ADDRESS", "NODE_RANK", "SOCKET_IFNAME"}
        environment = {key: value for key, value in os.environ.items() if key not in without} | self.variables | variables
        with (self.folder / f"{name}.txt").open("wb") as console:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT,
                env=environment, cwd=self.folder, start_new_session=True,
            )  # fmt: skip

    def console(self, name: str) -> str:
        return (self.folder / f"{name}.txt").read_text(errors="replace")

    def wait_for(self, file: str, seconds: float = 400.0) -> None:
        """Until somebody has made it in the working directory."""
        end = time.monotonic() + seconds
        while not (self.folder / file).exists():
            assert self.head.poll() is None and time.monotonic() < end, f"{self.console('head')}\n{self.console('other')}"
            time.sleep(0.1)

    def ended(self, seconds: float = 400.0) -> tuple[int, int]:
        """Exit codes of the head and the other; nothing of them is left a moment later."""
        end = time.monotonic() + seconds
        codes = tuple(process.wait(max(1.0, end - time.monotonic())) for process in (self.head, self.other))
        while (left := [*self.footprint.left(), *map(str, self.ray_folder.iterdir())]) and time.monotonic() < end:
            time.sleep(0.2)
        assert not left
        return codes

    def __exit__(self, *exception: object) -> None:
        self.footprint.end()
        shutil.rmtree(self.ray_folder, ignore_errors=True)
