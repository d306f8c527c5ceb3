"""What there is: the version of a tree and the state of each of its edits; nothing is changed here."""

from __future__ import annotations

from dataclasses import dataclass

from patches.trees.backup import Backup, Change
from patches.trees.edits import Edit, Refused, Release, State, apply_edit, holds
from patches.trees.files import digest
from patches.trees.finding import Tree


@dataclass(frozen=True)
class Finding:
    """State of one edit; `note` is the sentence behind it, `change` what applying it would write."""

    edit: Edit
    state: State
    note: str = ""
    change: Change | None = None


@dataclass(frozen=True)
class Inspection:
    tree: Tree
    backup: Backup
    release: Release
    findings: tuple[Finding, ...]

    def refusals(self) -> list[str]:
        if self.release.refusal:
            return [f"{self.tree.shown} is {self.tree.kind.name} {self.release.version}; expected {self.tree.kind.expected}"]
        notes = ((self.tree.package / finding.edit.path, finding) for finding in self.findings)
        return [f"{file}: {finding.note}" for file, finding in notes if finding.state is State.REFUSED]

    def is_complete(self) -> bool:
        return all(finding.state in (State.APPLIED, State.CONTAINED) for finding in self.findings)


def inspect(tree: Tree) -> Inspection:
    backup = tree.backup()
    release = tree.kind.identify(lambda path: original(backup, path).decode("utf-8", "replace"))
    findings = () if release.refusal else tuple(inspect_edit(backup, edit) for edit in tree.kind.edits)
    return Inspection(tree, backup, release, findings)


def original(backup: Backup, path: str) -> bytes:
    """A file as it was before any edit; empty when there is none."""
    if path in backup.records:
        return backup.original(path)
    file = backup.package / path
    return file.read_bytes() if file.is_file() else b""


def inspect_edit(backup: Backup, edit: Edit) -> Finding:
    file = backup.package / edit.path
    if not file.is_file():
        return Finding(edit, State.REFUSED, "there is no such file, and every known version has it")
    if file.resolve() != file:
        return Finding(edit, State.REFUSED, f"it is a link to {file.resolve()}, outside this tree: name the tree that holds it, or copy it")
    before = original(backup, edit.path)
    try:
        after = apply_edit(edit, before)
    except Refused as refusal:
        return Finding(edit, State.REFUSED, str(refusal))
    if edit.path in backup.records:
        return inspect_recorded(backup, edit, after, file.read_bytes())
    if after is None:
        return Finding(edit, State.CONTAINED)
    return Finding(edit, State.NOT_APPLIED, change=Change(before, after))


def inspect_recorded(backup: Backup, edit: Edit, after: bytes | None, current: bytes) -> Finding:
    """An edit that the manifest tells of. `after`: what this version of the script would write."""
    record = backup.records[edit.path]
    change = None if after is None else Change(backup.original(edit.path), after)
    if digest(current) == record.original:
        return Finding(edit, State.INTERRUPTED, "the file is as it was before: a run was stopped, or it was put back by hand", change)
    if digest(current) == record.patched:
        if current == after:
            return Finding(edit, State.APPLIED)
        return Finding(edit, State.OUTDATED, "applied by another version of this script", change)
    if holds(edit, current):
        return Finding(edit, State.APPLIED, "changed elsewhere since")
    file, kept = backup.package / edit.path, backup.original_file(edit.path)
    note = (
        f"it was changed after it was edited here and does not hold the edit any more. To keep it as it is, delete {backup.folder} and "
        f"run this again; to go back to what it was before the edit: cp {kept} {file}"
    )
    return Finding(edit, State.REFUSED, note)
