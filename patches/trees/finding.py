"""The trees below a folder, told by their content, and whether they belong together."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from patches.trees.backup import Backup
from patches.trees.edits import CORE, Kind, Refused, Release
from patches.trees.megatron import MEGATRON
from patches.trees.mindspeed import MINDSPEED
from patches.trees.mindspeed_rl import MINDSPEED_RL

KINDS: tuple[Kind, ...] = (MEGATRON, MINDSPEED, MINDSPEED_RL)
LEVELS = 2


@dataclass(frozen=True)
class Tree:
    """A package that is edited. `package` has no symbolic links; `shown` is how the user would name it."""

    kind: Kind
    package: Path
    shown: Path

    def backup(self) -> Backup:
        return Backup(self.package, (edit.path for edit in self.kind.edits))


def find_trees(path: Path) -> list[Tree]:
    """The known packages in a folder or one or two levels below it, each once however many links lead to it."""
    if not path.is_dir():
        raise Refused(f"{path} is not a folder: name the folder that holds the trees, or one tree")
    found: dict[Path, Tree] = {}
    for shown, kind in candidates(path):
        if (shown / kind.shown_by).is_file():
            found.setdefault(shown.resolve(), Tree(kind, shown.resolve(), shown))
    if not found:
        expected = "\n  ".join(f"{kind.package}/{kind.shown_by}: {kind.expected}" for kind in KINDS)
        raise Refused(f"no known tree in {path} or up to {LEVELS} levels below it. A tree is told by these files:\n  {expected}")
    return sorted(found.values(), key=lambda tree: (KINDS.index(tree.kind), tree.package))


def candidates(path: Path) -> list[tuple[Path, Kind]]:
    """Where packages may lie: below each folder, and the path itself when it is one."""
    itself = [(path, kind) for kind in KINDS if path.resolve().as_posix().endswith(f"/{kind.package}")]
    return itself + [(folder / kind.package, kind) for folder in folders_below(path, LEVELS) for kind in KINDS]


def folders_below(path: Path, levels: int) -> list[Path]:
    """The folder and those below it, hidden ones and those that may not be read left out."""
    if not levels or not os.access(path, os.R_OK | os.X_OK):
        return [path]
    children = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    return [path] + [folder for child in children for folder in folders_below(child, levels - 1)]


def check_together(releases: list[tuple[Tree, Release]]) -> None:
    """Refused when trees of different generations of megatron-core lie together: one of them would be imported by the other."""
    if len({release.core for _, release in releases}) > 1:
        each = "\n".join(f"  {tree.shown}: {tree.kind.name} {release.version}, for core {release.core}" for tree, release in releases)
        expected = "\n".join(f"  {kind.expected}" for kind in KINDS)
        raise Refused(
            f"these trees are not a combination that works:\n{each}\nexpected all for core {CORE}, which serve GRPO and DAPO, text and "
            f"VL:\n{expected}\nReplace the others, or name one folder with trees that belong together"
        )
