"""Kills a run at each of its steps on the disk, then looks whether the next run repairs it. `python -m tests.tree_kills FOLDER`

A process of its own: it forks a child for each kill, which threads of a test process would not survive.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import sys
from pathlib import Path

from patches.trees.command import main
from tests.vendored_trees import content_of, make_trees

CHANGES_THE_DISK = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.chown")


def kill_at(step: int) -> None:
    """SIGKILL for this process before its `step`-th change of the disk."""
    steps = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal steps
        writes = event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if event in CHANGES_THE_DISK or writes:
            steps += 1
            if steps == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run(*arguments: str) -> int:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return main(list(arguments))


def killed(step: int, *arguments: str) -> bool:
    child = os.fork()
    if child == 0:
        kill_at(step)
        os._exit(run(*arguments))
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def kills(folder: Path, start: Path, arguments: list[str], applied: dict, original: dict) -> int:
    """Number of steps of a run; after a kill at each, applying gives what is applied and reverting what was there first."""
    step = 1
    while True:
        tree = folder / "tree"
        for repair, wanted in (([], applied), (["--revert"], original)):
            shutil.rmtree(tree, ignore_errors=True)
            shutil.copytree(start, tree)
            was_killed = killed(step, *arguments, str(tree))
            if not was_killed:
                return step - 1
            assert run(*repair, str(tree)) == 0, (arguments, step, repair)
            assert content_of(tree) == wanted, (arguments, step, repair)
        step += 1


def every_kill(folder: Path) -> None:
    make_trees(folder / "all")
    pristine, patched = folder / "pristine", folder / "patched"
    shutil.copytree(folder / "all/mindspeed", pristine / "mindspeed")
    shutil.copytree(pristine, patched)
    assert run(str(patched)) == 0
    original, applied = content_of(pristine), content_of(patched)
    assert original != applied
    print("apply", kills(folder, pristine, [], applied, original))
    print("revert", kills(folder, patched, ["--revert"], applied, original))


if __name__ == "__main__":
    every_kill(Path(sys.argv[1]))
