"""What an edit of a vendored file is, and how it is made on the file's bytes."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

# Reads a file of the package as text as it was before any edit; "" when there is none.
Read = Callable[[str], str]

CORE = "0.12"
"""The generation of megatron-core that the edits are written for."""


class Refused(Exception):
    """A sentence for the user: what was found, what was expected, what to do."""


class Replacement(NamedTuple):
    """`anchor` occurs exactly once in the file and becomes `text`."""

    anchor: str
    text: str


@dataclass(frozen=True)
class Edit:
    """Changes in one file of a package.

    Example: Edit("tensor_parallel/random.py", "recompute restores actual_seq_len", "why", "actual_seq_len", (Replacement("a", "b"),))
    """

    path: str
    title: str
    reason: str
    contained: str
    """Text that is in the file when its makers (or the scripts of MindSpeed-MM) have made the change already."""
    replacements: tuple[Replacement, ...]


@dataclass(frozen=True)
class Release:
    """A version of a tree, as its content tells it. Example: Release("core 0.12.1, 2.1.0", core="0.12")."""

    version: str
    core: str = CORE
    """Generation of megatron-core that it belongs to; "" when unknown."""
    refusal: str = ""
    """Why it is not edited; "" when it is."""


@dataclass(frozen=True)
class Kind:
    """A project whose trees are edited. Paths are below `package`, the folder that users copy."""

    name: str
    package: str
    shown_by: str
    """File that only this package has."""
    identify: Callable[[Read], Release]
    expected: str
    edits: tuple[Edit, ...]


class State(enum.Enum):
    """Of one edit in one file."""

    APPLIED = "applied"
    NOT_APPLIED = "not applied"
    CONTAINED = "contained"
    INTERRUPTED = "interrupted"
    OUTDATED = "outdated"
    REFUSED = "refused"


def apply_edit(edit: Edit, original: bytes) -> bytes | None:
    """The file's new bytes, line ends as they are; None when the change is contained already. Refused when an anchor is not found once."""
    if edit.contained.encode() in original:
        return None
    patched = original
    for replacement in edit.replacements:
        anchor, text = in_line_ends_of(original, replacement)
        found = patched.count(anchor)
        if found != 1:
            first = replacement.anchor.strip().splitlines()[0].strip()
            raise Refused(f"expected exactly one place with `{first}` (and the lines after it) and found {found}")
        patched = patched.replace(anchor, text)
    check_syntax(edit, original, patched)
    return patched


def in_line_ends_of(content: bytes, replacement: Replacement) -> tuple[bytes, bytes]:
    """Anchor and text with the line ends of the file's first line."""
    windows = content.partition(b"\n")[0].endswith(b"\r")
    anchor, text = (part.replace("\n", "\r\n") if windows else part for part in replacement)
    return anchor.encode(), text.encode()


def holds(edit: Edit, content: bytes) -> bool:
    """Whether every change of the edit is in the file, wherever else it was changed since."""
    return all(in_line_ends_of(content, replacement)[1] in content for replacement in edit.replacements)


def check_syntax(edit: Edit, original: bytes, patched: bytes) -> None:
    """Refused when the edit breaks a file that this Python could compile before."""
    if compiles(original, edit.path) and not compiles(patched, edit.path):
        raise Refused("the edited file would not compile: the lines around the anchors are not those of a known version")


def compiles(content: bytes, path: str) -> bool:
    try:
        compile(content, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return True
