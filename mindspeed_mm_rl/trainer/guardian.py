"""A small process beside the driver that outlives it: whatever way a run ends, nothing of it is left running. The launcher has one, too.

driver --{"session": folder}-->  guardian    Ray's files, to be removed
       --{"over": true}------->              the driver has taken everything down itself: look for leftovers, say nothing
       --end of the pipe------>              without "over": the driver was killed; end every process of the run, say so

A process belongs to the run when it has inherited the run's marker (platforms/processes.py).
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from mindspeed_mm_rl.platforms import env, processes, signals
from mindspeed_mm_rl.trainer.save_folder import SaveFolder

_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from mindspeed_mm_rl.trainer.guardian import main; main(sys.argv[1])"
_SWEEP_SECONDS = 20.0


class Guardian:
    """The driver's side. Everything that is started inside the block carries the marker."""

    def __init__(self, save: str | None, name: str = "the driver", variable: str = processes.RUN_MARKER, marker: str = "") -> None:
        """save: where a run saves, for the way to go on; None: not of a run. name: of this process. marker: by default a new one."""
        self.variable, self.marker = variable, marker or secrets.token_hex(8)
        self._order = json.dumps({"marker": self.marker, "variable": variable, "name": name, "driver": os.getpid(), "save": save})

    def __enter__(self) -> Guardian:
        # A session of its own: Ctrl-C and the end of the terminal are not for it. Nor is the end of the launcher: it has something to say.
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, self._order, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env=env.without(processes.NODE_MARKER),
        )
        env.set_all({self.variable: self.marker} | processes.PROCESS_ENV)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.tell(over=True)
        try:
            self._process.stdin.close()
            self._process.wait(2 * _SWEEP_SECONDS)
        finally:
            env.remove(self.variable)

    def tell(self, **message: object) -> None:
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return  # Somebody killed the guardian; the run doesn't need it to go on.


def main(order: str) -> None:
    for number in signals.STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    settings = json.loads(order)
    told: dict[str, object] = {}
    for line in sys.stdin:
        told |= json.loads(line)
    is_over = "over" in told
    left = processes.end_all(settings["marker"], [settings["driver"]] if is_over else [], _SWEEP_SECONDS, settings["variable"])
    if "session" in told:
        processes.remove_ray_session(Path(str(told["session"])))
    if left:
        print(f"error: processes {left} of the run can't be ended", file=sys.stderr, flush=True)
    if not is_over:
        who = f"{settings['name']} (pid {settings['driver']} on {os.uname().nodename})"
        why = "killed by signal 9 (SIGKILL), for want of memory, or because Ray's daemon died"
        ended = "every process of the run was ended" if settings["save"] is not None else "all that it had started here was ended"
        advice = f". {go_on(settings['save'])}" if settings["save"] is not None else ""
        print(f"error: {who} ended without a word: {why}; {ended}{advice}", file=sys.stderr, flush=True)


def go_on(save: str) -> str:
    """How a run continues whose saves are in this folder."""
    if not save:
        return "Nothing was saved (actor_config.save is not set): the same command starts from the beginning"
    try:
        newest, _ = SaveFolder(Path(save)).newest_whole()
    except OSError as error:
        return f"Whether there is a save in {save} can't be read ({error.strerror})"
    if newest is None:
        return f"There is no save in {save} yet: the same command starts from the beginning"
    iteration = int(newest.name.removeprefix("iter_"))
    return f"To go on after iteration {iteration}: the same command with rl_config.resume=auto (it continues {newest})"
