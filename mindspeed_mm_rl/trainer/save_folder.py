"""The folder of a run's saves: each is whole or not there at all, and a text file names the one to use.

save/latest_checkpointed_iteration.txt      an iteration; editing it picks another save
save/best_checkpointed_iteration.txt        that of the save which was the best in evaluation, when there is evaluation
save/iter_0000050/actor/                    weights, optimizer, schedule, random state (torch_dist)
save/iter_0000050/critic/                   the same of the critic, where there is one
save/iter_0000050/state.json                everything else that a resumed run needs, and the list of the save's files
save/.iter_0000050.5f0c.partial             a save that is being written
save/.iter_0000050.replaced, .removed       one that is about to go
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mindspeed_mm_rl.data.rows import file_digest

TRACKER = "latest_checkpointed_iteration.txt"
BEST_TRACKER = "best_checkpointed_iteration.txt"
STATE_FILE = "state.json"
ACTOR_FOLDER = "actor"
_RELEASE = "release"
_SHARDS_OF = f"{ACTOR_FOLDER}/.metadata"
_KEYS = ("iteration", "written", "data", "kl_controller", "files")
_FOLDER_MODE, _FILE_MODE = 0o750, 0o640
_CANNOT_LOCK = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOTSUP)
"""Some network file systems can't lock folders; there nothing guards a run against a second one."""
_HASHED_BYTES = 2**20
"""Files up to this size are hashed; for larger ones the size must do, or a check would read the whole save."""


class SaveFolder:
    """Example: SaveFolder(Path("ckpt/dapo")).newest_whole() -> (Path("ckpt/dapo/iter_0000050"), [])."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path_of(self, iteration: int) -> Path:
        return self.root / f"iter_{iteration:07d}"

    def newest_whole(self) -> tuple[Path | None, list[str]]:
        """The save that the text file names; where it isn't whole, the one of the others that was written last.

        Also why those before it were passed over, a sentence each. None when there is no whole save, or the text file says release.
        """
        tracked = self._tracked()
        if tracked == _RELEASE:
            return None, []
        known = not tracked or tracked.isdigit()
        reasons = [] if known else [f"{self.root / TRACKER} says {tracked!r}, which is no iteration"]
        for save in self._in_order():
            try:
                check_whole(save)
            except ValueError as error:
                reasons.append(str(error))
                continue
            return save, reasons
        return None, reasons

    def _in_order(self) -> list[Path]:
        saves = sorted(self._saves(), key=_written, reverse=True)
        tracked = self._tracked()
        if not tracked.isdigit():
            return saves
        named = self.path_of(int(tracked))
        return [named, *(save for save in saves if save != named)]

    def _saves(self) -> list[Path]:
        return [save for save in self.root.glob("iter_*") if save.name.removeprefix("iter_").isdigit() and save.is_dir()]

    def _tracked(self) -> str:
        path = self.root / TRACKER
        return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""

    @contextmanager
    def held(self) -> Iterator[None]:
        """For one run at a time. Raises ValueError when another process holds it; a process that is killed lets go of it."""
        self.root.mkdir(parents=True, exist_ok=True, mode=_FOLDER_MODE)
        descriptor = os.open(self.root, os.O_RDONLY)
        try:
            _lock(descriptor, self.root)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def new_save(self, iteration: int, networks: Iterable[str] = (ACTOR_FOLDER,)) -> Iterator[Path]:
        """A folder to write into, with an empty one for each of the networks.

        When the block ends well it becomes the save that the text file names, else nothing of it is left.
        """
        # A name of its own: a worker of a killed run may still be writing into the old one.
        temporary = self.root / f".iter_{iteration:07d}.{secrets.token_hex(4)}.partial"
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=_FOLDER_MODE)
            temporary.mkdir(mode=_FOLDER_MODE)
            for name in networks:
                (temporary / name).mkdir(mode=_FOLDER_MODE)
            yield temporary
            _make_durable(temporary)
            tracker = self._new_tracker(iteration)
            self._put_in_place(temporary, self.path_of(iteration))
            tracker.rename(self.root / TRACKER)
            _sync(self.root)
        except BaseException:
            _remove(temporary)
            raise
        self.mend()

    def begin_at(self, save: Path | None, iteration: int) -> None:
        """Makes the text file say where a run begins, so that one which dies before its first save is continued from there, not elsewhere.

        A save of another folder gets a link here. None: a new run, whatever saves of an older one are here.
        Raises ValueError when a save of that iteration is here already and is another one.
        """
        if save is None:
            if self._saves():
                self._point_at(_RELEASE)
            return
        own = self.path_of(iteration)
        if save.resolve() != own.resolve():
            if own.exists():
                raise ValueError(
                    f"{save} is to be continued with its saves in {self.root}, which holds another {own.name}: give actor_config.save a "
                    "folder of its own"
                )
            own.unlink(missing_ok=True)
            own.symlink_to(save.resolve())
        self._point_at(iteration)

    def _point_at(self, what: int | str) -> None:
        self._new_tracker(what).rename(self.root / TRACKER)
        _sync(self.root)

    def point_at_best(self, iteration: int | None) -> None:
        """Names the best save for people and scripts; None, or a save that isn't here: there is none."""
        tracker = self.root / BEST_TRACKER
        if iteration is None or not self.path_of(iteration).exists():
            tracker.unlink(missing_ok=True)
        else:
            self._new_tracker(iteration, BEST_TRACKER).rename(tracker)

    def _new_tracker(self, iteration: int | str, name: str = TRACKER) -> Path:
        temporary = self.root / f".{name}.partial"
        temporary.write_text(f"{iteration}\n", encoding="utf-8")
        temporary.chmod(_FILE_MODE)
        _sync(temporary)
        return temporary

    def _put_in_place(self, temporary: Path, final: Path) -> None:
        if final.exists():
            replaced = self._leaving(final, "replaced")
            final.rename(replaced)
        temporary.rename(final)

    def _leaving(self, save: Path, why: str) -> Path:
        """Where a save goes on its way out: it leaves its name at once, so that half of it is never taken for a save."""
        path = save.with_name(f".{save.name}.{why}")
        _remove(path)
        return path

    def remove_old(self, keep_last: int, best: int | None = None) -> None:
        """Leaves the `keep_last` saves that were written last (0 = all), and that of iteration `best`.

        By age: what a run wrote that was abandoned is not newer.
        """
        saves = sorted((save for save in self._saves() if _written(save)[0] < float("inf")), key=_written)
        for old in saves[:-keep_last] if keep_last else []:
            if best is not None and old == self.path_of(best):
                continue
            leaving = self._leaving(old, "removed")
            old.rename(leaving)
            _remove(leaving)

    def mend(self) -> None:
        """After a run that was stopped anywhere: a save that was being replaced gets its name back, leftovers go. Nobody may be writing."""
        for replaced in self.root.glob(".iter_*.replaced"):
            final = self.root / replaced.name.removeprefix(".").removesuffix(".replaced")
            if not final.exists():
                replaced.rename(final)
        # Nothing is touched where there is nothing to do: the disk may be read-only by now.
        for ending in ("partial", "replaced", "removed"):
            for path in self.root.glob(f".iter_*.{ending}"):
                _remove(path)
        for path in self.root.glob(".*_checkpointed_iteration.txt.partial"):
            path.unlink()


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"actor_config.save: another run is working with {folder}; wait until it is over, or give this one a folder of its own"
        ) from error
    except OSError as error:
        if error.errno not in _CANNOT_LOCK:
            raise


def write_state(save: Path, contents: dict[str, Any]) -> None:
    """The last file of a save: `contents`, and the list of the files beside it."""
    files = {path.relative_to(save).as_posix(): _entry(path) for path in sorted(save.rglob("*")) if path.is_file()}
    (save / STATE_FILE).write_text(json.dumps({**contents, "files": files}, indent=1), encoding="utf-8")


def check_whole(save: Path) -> dict[str, Any]:
    """What state.json of a save says. Raises ValueError when a file of the save is missing or is not as it was written."""
    try:
        contents = json.loads((save / STATE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{save} is no whole training save: it has no {STATE_FILE}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{save} is no whole training save: {STATE_FILE} cannot be read ({error})") from error
    missing = [key for key in _KEYS if key not in contents] if isinstance(contents, dict) else _KEYS
    if missing:
        raise ValueError(f"{save} is no whole training save: {STATE_FILE} lacks {', '.join(missing)}")
    if _SHARDS_OF not in contents["files"]:
        raise ValueError(f"{save} is no whole training save: {STATE_FILE} lists no {_SHARDS_OF}")
    for name, recorded in contents["files"].items():
        _check_file(save, name, recorded)
    return contents


def _check_file(save: Path, name: str, recorded: dict[str, Any]) -> None:
    path = save / name
    if not path.is_file():
        raise ValueError(f"{save} is no whole training save: {name} is missing")
    size = path.stat().st_size
    if size != recorded["bytes"]:
        raise ValueError(f"{save} is no whole training save: {name} has {size} bytes, {recorded['bytes']} were written")
    if "sha256" in recorded and file_digest(path) != recorded["sha256"]:
        raise ValueError(f"{save} is no whole training save: {name} is not what was written (its sha256 differs)")


def _entry(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    return {"bytes": size, "sha256": file_digest(path)} if size <= _HASHED_BYTES else {"bytes": size}


def _written(save: Path) -> tuple[float, str]:
    """When a save was written, in seconds; one that can't say so counts as the newest, so that it is looked at and spoken of."""
    try:
        return float(json.loads((save / STATE_FILE).read_text(encoding="utf-8"))["written"]), save.name
    except (OSError, ValueError, KeyError, TypeError):
        return float("inf"), save.name


def _remove(path: Path) -> None:
    """As far as it can be; what stays has a name that is never taken for a save."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _make_durable(folder: Path) -> None:
    """fsync of every file and folder, files 640 and folders 750."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(_FOLDER_MODE if path.is_dir() else _FILE_MODE)
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
