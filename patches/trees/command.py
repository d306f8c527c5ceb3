"""The command: finds the trees, prints what there is as a table, applies or reverts."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from patches.trees.edits import Refused, State
from patches.trees.finding import Tree, check_together, find_trees
from patches.trees.state import Inspection, inspect

DONE, REFUSED, TO_APPLY = 0, 2, 3
PROGRAM = "apply_dapo_mindspeed_patches.sh"
DESCRIPTION = """Edits vendored MindSpeed, Megatron-LM and MindSpeed-RL trees so that one set of them serves GRPO and DAPO, text and VL.
Asks nothing, may be run again, keeps the original bytes inside each tree."""
EXIT_CODES = "exit code: 0 done, or nothing to do; 2 refused, nothing was changed; 3 (--check) there is something to apply"


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    try:
        trees = find_trees(options.path)
        with contextlib.ExitStack() as locks:
            for tree in trees:
                locks.enter_context(alone(tree))
            if options.revert:
                return revert(trees)
            return check(trees) if options.check else apply(trees)
    except Refused as refusal:
        print(f"error: {refusal}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error}. Run this again, or --revert: both repair a run that stopped half way", file=sys.stderr)
    return REFUSED


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(PROGRAM, description=DESCRIPTION, epilog=EXIT_CODES, formatter_class=argparse.RawTextHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="say what there is and change nothing")
    action.add_argument("--revert", action="store_true", help="put the original bytes back")
    parser.add_argument("path", metavar="PATH", nargs="?", type=Path, default=Path(), help="a tree, or a folder with several (default: .)")
    return parser.parse_args(arguments)


@contextlib.contextmanager
def alone(tree: Tree) -> Iterator[None]:
    """Refused while another run works on the tree. The kernel drops the lock with the process."""
    descriptor = os.open(tree.package, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise Refused(f"another run of this script works on {tree.shown}: wait for it") from None
    finally:
        os.close(descriptor)


def check(trees: list[Tree]) -> int:
    inspections = [inspect(tree) for tree in trees]
    print_table(inspections)
    refuse_any(inspections)
    if all(inspection.is_complete() for inspection in inspections):
        print("nothing to apply")
        return DONE
    print(f"there is something to apply: run {PROGRAM} without --check")
    return TO_APPLY


def apply(trees: list[Tree]) -> int:
    inspections = [inspect(tree) for tree in trees]
    try:
        refuse_any(inspections)
    except Refused:
        print_table(inspections)
        raise
    for inspection in inspections:
        if not inspection.is_complete():
            inspection.backup.check_writable(finding.edit.path for finding in inspection.findings if finding.change)
    inspections = [apply_tree(inspection) for inspection in inspections]
    print_table(inspections)
    return DONE


def apply_tree(inspection: Inspection) -> Inspection:
    """Apply what is missing; what a stopped run or another version of this script has left is taken back first."""
    inspection.backup.tidy()
    if inspection.is_complete():
        return inspection
    if inspection.backup.records:
        inspection.backup.revert()
        inspection = inspect(inspection.tree)
    changes = {finding.edit.path: finding.change for finding in inspection.findings if finding.change}
    if changes:
        inspection.backup.apply(changes)
    return inspect(inspection.tree)


def revert(trees: list[Tree]) -> int:
    """Put back tree by tree; what is refused in one does not keep the others."""
    refusals = []
    for tree in trees:
        try:
            restored = tree.backup().revert()
            print(f"{tree.kind.name:<12} {'reverted' if restored else 'nothing to revert':<18} {tree.shown}")
            for path in restored:
                print(f"  {'restored':<12} {path}")
        except Refused as refusal:
            refusals.append(str(refusal))
    if refusals:
        raise Refused("\n".join(refusals))
    return DONE


def refuse_any(inspections: list[Inspection]) -> None:
    refusals = [sentence for inspection in inspections for sentence in inspection.refusals()]
    if refusals:
        raise Refused("nothing was changed:\n" + "\n".join(f"  {sentence}" for sentence in refusals))
    check_together([(inspection.tree, inspection.release) for inspection in inspections])


def print_table(inspections: list[Inspection]) -> None:
    """Flushed, so that an error comes after it when both go to one file."""
    for inspection in inspections:
        print(f"{inspection.tree.kind.name:<12} {inspection.release.version:<44} {inspection.tree.shown}")
        for finding in inspection.findings:
            note = f" ({finding.note})" if finding.note and finding.state is not State.REFUSED else ""
            print(f"  {finding.state.value:<12} {finding.edit.title + note:<48} {finding.edit.path}")
        if inspection.release.refusal:
            print(f"  {State.REFUSED.value:<12} {inspection.release.refusal}")
    if len(inspections) > 1 and not any(inspection.refusals() for inspection in inspections):
        print(f"{'together':<12} {combination(inspections)}")
    sys.stdout.flush()


def combination(inspections: list[Inspection]) -> str:
    """What the table says of trees that lie together."""
    cores = sorted({inspection.release.core for inspection in inspections})
    return f"core {cores[0]}: a supported combination" if len(cores) == 1 else f"refused: for core {' and core '.join(cores)}"
