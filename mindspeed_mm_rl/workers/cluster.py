"""One machine's part in a Ray cluster that lives as long as one run.

head    starts Ray -> waits for the other machines -> the run -> tells each machine by a task how it ended -> stops Ray
joins   waits for the head -> starts Ray -> looks for what the task wrote, for the end of Ray, for the end of the head -> stops Ray
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from mindspeed_mm_rl.platforms import env, network, processes, signals

_CONNECT_SECONDS, _ANSWER_SECONDS = 4.0, 10.0
_LOOK_SECONDS, _SAY_AGAIN_SECONDS = 1.0, 15.0
_TELL_SECONDS = 20.0
"""For a task to start on every machine; one that does not answer finds out by itself that the head is gone."""
_LEAVE_SECONDS = 5.0
_REFUSED_BEFORE_GONE = 3
_OUTCOME, _LOG = "outcome", "ray_start.log"
_BAD_TOKEN = ("AuthenticationError", "InvalidAuthToken", "Unauthenticated")


class ClusterFailed(RuntimeError):
    """Ray, or the head, is gone."""

    exit_code = 1


@dataclass(frozen=True)
class Head:
    """Where the head's Ray listens. Example: str(Head("10.0.0.1", 6766)) == "10.0.0.1:6766"."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def absent(self) -> str:
        """Why no machine can join, in words; empty when one can. Raises ValueError when this one never will."""
        if reason := network.unreachable(self.host, self.port, _CONNECT_SECONDS):
            return reason
        command = ["ray", "health-check", "--address", str(self)]
        try:
            asked = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            return f"whoever listens at {self} does not answer as a Ray head"
        if asked.returncode and any(word in asked.stderr for word in _BAD_TOKEN):
            raise ValueError(
                f"the head at {self} has another Ray token than this machine: copy ~/.ray/auth_token from there, "
                "or set RAY_AUTH_MODE=disabled on all machines of a network that is yours alone"
            )
        return f"whoever listens at {self} is no Ray head, or one of another version" if asked.returncode else ""


def wait_for_head(head: Head, seconds: float) -> None:
    """Raises ValueError with what stands in the way at the end."""
    deadline, said = time.monotonic() + seconds, 0.0
    while reason := head.absent():
        if time.monotonic() > deadline:
            raise ValueError(
                f"no head at MASTER_ADDR within {seconds:g} s: {reason}. Is MASTER_ADDR ({head.host}) an address of the machine that is to "
                f"be the head, is the script running there, and is RAY_PORT ({head.port}) the same and open? Where the head starts later "
                "than the others, set WAIT_SECONDS"
            )
        if time.monotonic() - said > _SAY_AGAIN_SECONDS:
            said = time.monotonic()
            say(f"waiting for the head: {reason}")
        time.sleep(_LOOK_SECONDS)


class RayNode:
    """Ray's processes on this machine. They inherit the marker of the launcher, whose guardian ends those that are left."""

    def __init__(self, folder: Path, address: str, arguments: Sequence[str]) -> None:
        """folder: for all of Ray's files; arguments: of `ray start`."""
        self.folder, self.address = folder, address
        self._command = ["ray", "start", "--block", "--temp-dir", str(folder), "--node-ip-address", address, *arguments]

    def __enter__(self) -> RayNode:
        env.set_all({"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"})
        with (self.folder / _LOG).open("wb") as log:
            # A session of its own: the terminal's Ctrl-C is not for it.
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._leave()
        # What else it has started goes by its marker.
        self._process.kill()
        self._process.wait()

    def _leave(self) -> None:
        """The daemon, told to end, tells the head that this machine leaves; killed, it would be missed only half a minute later."""
        daemons = [pid for pid in processes.of_run(str(self.folder), processes.NODE_MARKER) if processes.name_of(pid) == "raylet"]
        for pid in daemons:
            processes.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + _LEAVE_SECONDS
        while any(processes.name_of(pid) == "raylet" for pid in daemons) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS / 10)

    def check(self) -> None:
        """Raises ClusterFailed when Ray has ended."""
        if self._process.poll() is not None:
            lines = (self.folder / _LOG).read_text(errors="replace").split("\n")
            told = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
            raise ClusterFailed(f"Ray on this machine ({self.address}) has ended: {told[:300]}")

    def outcome(self) -> int | None:
        """The exit code of the run, once the head has told it."""
        file = self.folder / _OUTCOME
        return int(file.read_text()) if file.exists() else None


def wait_for_machines(node: RayNode, head: Head, count: int, seconds: float) -> None:
    """Raises ValueError when fewer have joined in time, ClusterFailed when the head's own Ray ends."""
    deadline, known = time.monotonic() + seconds, -1
    with _connected(node, head, deadline):
        import ray

        while True:
            node.check()
            joined = sorted(machine["NodeManagerAddress"] for machine in ray.nodes() if machine["Alive"])
            if len(joined) != known:
                known = len(joined)
                say(f"{known} of {count} machines are there: {', '.join(joined)}")
            if known >= count:
                return
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{known} of NNODES={count} machines joined within {seconds:g} s: {', '.join(joined)}; is the script running on the "
                    f"others, with MASTER_ADDR {head.host} and RAY_PORT {head.port}? Where they start later, set WAIT_SECONDS"
                )
            time.sleep(_LOOK_SECONDS)


@contextmanager
def _connected(node: RayNode, head: Head, deadline: float) -> Iterator[None]:
    # Ray itself waits in long steps for somebody to listen.
    while network.unreachable(head.host, head.port, _CONNECT_SECONDS):
        _go_on_trying(node, head, deadline)
    import ray

    with signals.kept():
        while True:
            try:
                ray.init(address=str(head), log_to_driver=False, logging_level="CRITICAL")
                break
            except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
                _go_on_trying(node, head, deadline, str(error).partition("\n")[0])
    try:
        yield
    finally:
        ray.shutdown()


def _go_on_trying(node: RayNode, head: Head, deadline: float, reason: str = "nothing listens there") -> None:
    node.check()
    if time.monotonic() > deadline:
        raise ClusterFailed(f"the head's own Ray does not answer at {head}: {reason}")
    time.sleep(_LOOK_SECONDS / 4)


def tell_all(node: RayNode, head: Head, exit_code: int) -> None:
    """Every machine learns how the run has ended. Those that don't answer are left alone."""
    deadline = time.monotonic() + _TELL_SECONDS
    try:
        with _connected(node, head, deadline):
            import ray
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            machines = [NodeAffinitySchedulingStrategy(machine["NodeID"], soft=False) for machine in ray.nodes() if machine["Alive"]]
            write = ray.remote(num_cpus=0, max_retries=0)(_write_outcome)
            told = [write.options(scheduling_strategy=machine).remote(exit_code) for machine in machines]
            ray.wait(told, num_returns=len(told), timeout=max(0.0, deadline - time.monotonic()))
    except ClusterFailed as failure:
        say(f"the other machines could not be told: {failure}")


def _write_outcome(exit_code: int) -> None:
    """Runs on each machine, in a process that has inherited the marker of its launcher."""
    file = Path(env.read(processes.NODE_MARKER)) / _OUTCOME
    unfinished = file.with_suffix(".partial")
    unfinished.write_text(str(exit_code))
    unfinished.rename(file)


def wait_for_outcome(node: RayNode, head: Head) -> int:
    """The exit code of the run, from the head. Raises ClusterFailed when Ray here, or the head, ends without one."""
    refused = 0
    while True:
        failure = None
        try:
            node.check()
            refused = refused + 1 if network.unreachable(head.host, head.port, _CONNECT_SECONDS) else 0
            if refused >= _REFUSED_BEFORE_GONE:
                raise ClusterFailed(f"the head at {head} is gone without a word")
        except ClusterFailed as found:
            failure = found
        # After the others: the head tells it before it goes.
        if (outcome := node.outcome()) is not None:
            return outcome
        if failure:
            raise failure
        time.sleep(_LOOK_SECONDS)


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
