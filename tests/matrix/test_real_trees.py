"""apply_dapo_mindspeed_patches.sh on the real sources: each folder of DATA/trees is a checkout of MindSpeed, Megatron-LM or MindSpeed-RL.

git --git-dir MindSpeed/.git archive 5176c6f5f133111e55a404d82bd2dc14a809a6ab mindspeed | tar x -C data/trees/mindspeed-5176c6f
bash scripts/test.sh matrix -k real_trees --data data
"""

from __future__ import annotations

import ast
import os
import py_compile
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from patches.trees.finding import KINDS, Tree, find_trees
from patches.trees.megatron import MEGATRON
from patches.trees.mindspeed import MINDSPEED
from patches.trees.mindspeed_rl import MINDSPEED_RL
from patches.trees.state import inspect
from tests.vendored_trees import content_of, times_of

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples/rl/scripts/apply_dapo_mindspeed_patches.sh"


def sources(config: pytest.Config) -> list[Tree]:
    folder = Path(config.getoption("--data")).expanduser() / "trees"
    return [tree for checkout in sorted(folder.iterdir()) for tree in find_trees(checkout)] if folder.is_dir() else []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "source" in metafunc.fixturenames:
        trees = sources(metafunc.config)
        metafunc.parametrize("source", trees or [None], ids=[tree.shown.as_posix().split("/trees/")[1] for tree in trees] or ["none"])


def of(config: pytest.Config, kind: object, word: str) -> Tree:
    """The first source of a kind whose version holds a word; skips without."""
    for tree in sources(config):
        if tree.kind is kind and word in inspect(tree).release.version:
            return tree
    pytest.skip(f"no {kind.name} ({word}) in DATA/trees: pass --data DIR")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def copy(tree: Tree, folder: Path) -> Path:
    """The package alone, as users copy it."""
    package = folder / tree.kind.package
    shutil.copytree(tree.package, package, ignore=shutil.ignore_patterns("__pycache__"))
    return package


def test_check_apply_again_and_revert(source, tmp_path):
    if source is None:
        pytest.skip("no sources in DATA/trees: pass --data DIR")
    copy(source, tmp_path)
    before, times = content_of(tmp_path), times_of(tmp_path)
    inspection = inspect(source)
    checked = run("--check", tmp_path)
    print(checked.stdout, checked.stderr)
    assert times_of(tmp_path) == times
    if inspection.release.refusal:
        applied = run(tmp_path)
        assert (checked.returncode, applied.returncode) == (2, 2)
        assert "expected" in applied.stderr and times_of(tmp_path) == times
        return
    assert checked.returncode == (0 if inspection.is_complete() else 3)

    applied = run(tmp_path)
    assert (applied.returncode, applied.stderr) == (0, "")
    assert run("--check", tmp_path).returncode == 0
    for edit in source.kind.edits:
        py_compile.compile(str(tmp_path / source.kind.package / edit.path), cfile=str(tmp_path / "compiled"), doraise=True)
    (tmp_path / "compiled").unlink()
    changed = {name for name, content in content_of(tmp_path).items() if before.get(name) != content and ".mm_rl_patches" not in name}
    assert changed == {f"{source.kind.package}/{finding.edit.path}" for finding in inspection.findings if finding.change}

    times = times_of(tmp_path)
    assert run(tmp_path).returncode == 0
    assert times_of(tmp_path) == times

    assert run("--revert", tmp_path).returncode == 0
    assert content_of(tmp_path) == before


def test_the_pins_of_grpo_and_dapo_make_one_folder(request, tmp_path):
    for kind, word in ((MEGATRON, "0.12.1"), (MINDSPEED, "5176c6f"), (MINDSPEED_RL, "d9212e1")):
        copy(of(request.config, kind, word), tmp_path)
    before = content_of(tmp_path)
    applied = run(tmp_path)
    assert applied.returncode == 0
    assert applied.stdout.count("  applied ") == sum(len(kind.edits) for kind in KINDS)
    assert "a supported combination" in applied.stdout
    assert run("--revert", tmp_path).returncode == 0
    assert content_of(tmp_path) == before


def test_trees_of_core_0_8_and_0_12_are_refused_together(request, tmp_path):
    copy(of(request.config, MINDSPEED, "5176c6f"), tmp_path)
    copy(of(request.config, MINDSPEED_RL, "2.1.0, GRPO only"), tmp_path)
    before = content_of(tmp_path)
    refused = run(tmp_path)
    assert refused.returncode == 2
    assert "for core 0.8" in refused.stderr and "core_v0.12.1" in refused.stderr
    assert content_of(tmp_path) == before


# The real megatron-core on this device; of the real mindspeed/utils.py, which needs an NPU to be imported, the two functions.
RECOMPUTE = """
import sys, torch
from mindspeed_mm_rl.platforms import device

device.adapt_megatron()
import megatron.core
from megatron.core.tensor_parallel import random
from mindspeed.utils import get_actual_seq_len, set_actual_seq_len

assert megatron.core.__file__.startswith(sys.argv[1]), megatron.core.__file__
x = torch.tensor([3.0], requires_grad=True)
set_actual_seq_len((2,))
first = random.checkpoint(lambda x: x * get_actual_seq_len()[0], False, x)
set_actual_seq_len((5,))
first.sum().backward()
print("gradient", x.grad.item(), "boundaries", get_actual_seq_len())
"""


@pytest.mark.parametrize(("is_edited", "gradient"), [(False, 5.0), (True, 2.0)])
def test_recomputation_in_the_real_megatron_core(request, tmp_path, is_edited, gradient):
    """Without the edit the recomputation sees the other batch's boundaries: 5 instead of 2."""
    copy(of(request.config, MEGATRON, "0.12.1"), tmp_path)
    utilities = ast.parse((of(request.config, MINDSPEED, "5176c6f").package / "utils.py").read_text())
    wanted = [node for node in utilities.body if getattr(node, "name", "") in ("get_actual_seq_len", "set_actual_seq_len")]
    wanted += [node for node in utilities.body if isinstance(node, ast.Assign) and ast.unparse(node) == "_ACTUAL_SEQ_LEN = None"]
    assert len(wanted) == 3
    (tmp_path / "mindspeed").mkdir()
    (tmp_path / "mindspeed/utils.py").write_text("\n".join(ast.unparse(node) for node in wanted))
    if is_edited:
        assert run(tmp_path).returncode == 0
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    done = subprocess.run(
        [sys.executable, "-c", RECOMPUTE, str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert f"gradient {gradient} boundaries (5,)" in done.stdout, done.stderr
