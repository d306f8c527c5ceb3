"""Files replaced all or none: everything is written beside its target first, then renamed."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from patches.trees.edits import Refused


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def temporary_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.mm_rl_new")


def check_writable(paths: Iterable[Path]) -> None:
    """Refused when a file or folder is read-only, for root too: the bits say what the owner wants."""
    for path in paths:
        if not os.access(path, os.W_OK) or not path.stat().st_mode & 0o222:
            raise Refused(f"{path} is read-only: make it writable (chmod u+w {path}) or name a copy of the tree")


def replace_all(contents: Mapping[Path, bytes], between: Callable[[], None]) -> None:
    """Give existing files new bytes; mode and owner stay. `between` runs when all are written and none is renamed yet.

    A full disk or an error up to there leaves every target as it was.
    """
    try:
        for target, content in contents.items():
            write_beside(target, content)
        between()
    except BaseException:
        remove_temporaries(contents)
        raise
    for target in contents:
        os.replace(temporary_of(target), target)
        sync_folder(target.parent)


def write_beside(target: Path, content: bytes) -> None:
    like = target.stat()
    temporary = temporary_of(target)
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as file:
        file.write(content)
        file.flush()
        written = os.fstat(file.fileno())
        if (written.st_uid, written.st_gid) != (like.st_uid, like.st_gid):
            os.fchown(file.fileno(), like.st_uid, like.st_gid)
        os.fchmod(file.fileno(), stat.S_IMODE(like.st_mode))
        os.fsync(file.fileno())


def remove_temporaries(targets: Iterable[Path]) -> None:
    for target in targets:
        temporary_of(target).unlink(missing_ok=True)


def write_new(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def give_to_owner_of(folder: Path, paths: Iterable[Path]) -> None:
    """What root writes into a user's tree is the user's, so that the user can revert it."""
    owner = folder.stat()
    if os.geteuid() == 0:
        for path in paths:
            os.chown(path, owner.st_uid, owner.st_gid)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
