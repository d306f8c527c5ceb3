"""The bytes before any edit, kept inside the package, and the record of what was edited.

    .mm_rl_patches/originals/<path>   the file's bytes
    .mm_rl_patches/manifest.json      sha256 of each file before and after; written when all of the above lies on the disk

The manifest is there before the first file changes and until the last one is back, so a run that was killed is seen by the next one:
each recorded file then is the original or the edited one, and either way what to do is known.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from patches.trees.edits import Refused
from patches.trees.files import check_writable, digest, give_to_owner_of, remove_temporaries, replace_all, sync_folder, write_new

FORMAT = 1


class Record(NamedTuple):
    """sha256 of one file before and after the edit."""

    original: str
    patched: str


class Change(NamedTuple):
    """Bytes of one file before and after the edit."""

    original: bytes
    patched: bytes


class Backup:
    def __init__(self, package: Path, paths: Iterable[str]) -> None:
        """`paths`: the files that may be edited, where a run that was stopped leaves what it wrote beside them."""
        self.package = package
        self.paths = tuple(paths)
        self.folder = package / ".mm_rl_patches"
        self.manifest = self.folder / "manifest.json"
        self.records = self._read()

    def _read(self) -> dict[str, Record]:
        """Path below the package to its record; {} when nothing is applied."""
        if not self.manifest.is_file():
            return {}
        try:
            stored = json.loads(self.manifest.read_text())
            records = {path: Record(**record) for path, record in stored["files"].items()} if stored["format"] == FORMAT else None
        except (ValueError, KeyError, TypeError, AttributeError):
            records = None
        if records is None:
            raise Refused(
                f"{self.manifest} is of another version of this script: put the files of {self.folder} back by hand and delete it"
            )
        return records

    def original_file(self, path: str) -> Path:
        return self.folder / "originals" / path

    def original(self, path: str) -> bytes:
        """The recorded bytes. Refused when they are missing or damaged."""
        file = self.original_file(path)
        content = file.read_bytes() if file.is_file() else b""
        if digest(content) != self.records[path].original:
            raise Refused(f"the backup {file} is missing or damaged: get the file from its project and delete {self.folder}")
        return content

    def check_writable(self, paths: Iterable[str]) -> None:
        """Refused when one of these files, its folder or the package may not be changed."""
        files = [self.package / path for path in paths]
        check_writable([self.package, *files, *(file.parent for file in files)])

    def apply(self, changes: Mapping[str, Change]) -> None:
        """Write the edited files, all or none; nothing may be recorded yet."""
        assert not self.records
        self.discard()
        replace_all({self.package / path: change.patched for path, change in changes.items()}, between=lambda: self._save(changes))
        self.records = self._read()

    def _save(self, changes: Mapping[str, Change]) -> None:
        for path, change in changes.items():
            file = self.original_file(path)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_new(file, change.original)
        files = {path: Record(digest(change.original), digest(change.patched))._asdict() for path, change in changes.items()}
        draft = self.folder / "manifest.part"
        write_new(draft, (json.dumps({"format": FORMAT, "files": files}, indent=2) + "\n").encode())
        give_to_owner_of(self.package, [self.folder, *self.folder.rglob("*")])
        draft.replace(self.manifest)
        sync_folder(self.folder)

    def revert(self) -> list[str]:
        """Put every recorded file back; returns the paths that were. Refused, with nothing changed, when a file was changed since."""
        restored = {path: self.original(path) for path, record in self.records.items() if not self._is_original(path, record)}
        if self.records:
            self.check_writable(self.records)
        replace_all({self.package / path: content for path, content in restored.items()}, between=lambda: None)
        self.discard()
        self.records = {}
        return list(restored)

    def _is_original(self, path: str, record: Record) -> bool:
        file = self.package / path
        current = digest(file.read_bytes()) if file.is_file() else "none"
        if current not in record:
            backup = self.original_file(path)
            raise Refused(
                f"{file} was changed after it was edited here, and going back would lose that. Undo your change, or give it up "
                f"(cp {backup} {file}), then run --revert again"
            )
        return current == record.original

    def tidy(self) -> None:
        """Remove what a run that was stopped has left beside the files."""
        remove_temporaries(self.package / path for path in {*self.paths, *self.records})

    def discard(self) -> None:
        """Remove the folder; its manifest first, so that a folder without one is always a left-over."""
        self.tidy()
        if self.folder.is_dir():
            self.manifest.unlink(missing_ok=True)
            sync_folder(self.folder)
            shutil.rmtree(self.folder)
