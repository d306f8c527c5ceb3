"""apply_dapo_mindspeed_patches.sh on small trees: nothing is half done, nothing of the user's is lost, what is unknown is refused."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from patches.trees import command
from patches.trees.backup import Backup, Change
from patches.trees.edits import apply_edit
from patches.trees.finding import KINDS
from patches.trees.megatron import RECOMPUTE
from tests.vendored_trees import content_of, edited_files, make_trees, times_of

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples/rl/scripts/apply_dapo_mindspeed_patches.sh"
RANDOM = "megatron/core/tensor_parallel/random.py"
DOCK = "mindspeed_rl/trainer/utils/mm_transfer_dock.py"
WORKER = "mindspeed_rl/workers/actor_hybrid_worker.py"


@pytest.fixture
def trees(tmp_path: Path) -> Path:
    return make_trees(tmp_path / "trees")


@pytest.fixture
def run(capsys):
    """Runs the command in this process: exit code, table, errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = command.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def refused(run, folder: Path, *words: str) -> str:
    """Apply is refused with these words and leaves every byte."""
    before = content_of(folder)
    code, _, error = run(folder)
    assert code == 2
    assert content_of(folder) == before
    for word in words:
        assert word in error
    return error


def test_apply_edits_all_and_revert_gives_the_same_bytes(trees, run):
    before = content_of(trees)
    assert run("--check", trees)[0] == 3
    assert content_of(trees) == before
    code, table, error = run(trees)
    assert (code, error) == (0, "")
    assert table.count("  applied ") == len(edited_files(trees)) == 5
    assert "core 0.12: a supported combination" in table
    for file in edited_files(trees):
        compile(file.read_bytes(), str(file), "exec")
    assert run("--check", trees)[0] == 0
    assert run("--revert", trees)[0] == 0
    assert content_of(trees) == before


def test_applying_again_touches_nothing(trees, run):
    run(trees)
    times = times_of(trees)
    code, table, _ = run(trees)
    assert code == 0 and table.count("  applied ") == 5
    assert times_of(trees) == times


def test_a_kill_at_any_step_is_repaired_by_the_next_run():
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory if os.access(shared_memory, os.W_OK) else None) as folder:
        run = [sys.executable, "-m", "tests.tree_kills", folder]
        done = subprocess.run(run, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps = re.findall(r"(apply|revert) (\d+)", done.stdout)
    # Three files: at least a copy, a record, a new file and a renaming each.
    assert [name for name, _ in steps] == ["apply", "revert"] and all(int(number) >= 9 for _, number in steps)


def test_a_file_is_replaced_and_never_written_in_place(trees, run, tmp_path):
    """Who reads it meanwhile, or holds a link to it, sees the old bytes or the new ones."""
    original = (trees / RANDOM).read_bytes()
    os.link(trees / RANDOM, tmp_path / "before")
    run(trees)
    os.link(trees / RANDOM, tmp_path / "edited")
    run("--revert", trees)
    assert (tmp_path / "before").read_bytes() == original
    assert b"_sequence_boundaries" in (tmp_path / "edited").read_bytes()


def test_windows_line_ends_and_modes_stay(trees, run):
    file = trees / RANDOM
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    file.chmod(0o750)
    before = content_of(trees)
    assert run(trees)[0] == 0
    assert b"_sequence_boundaries" in file.read_bytes()
    assert not re.search(rb"[^\r]\n", file.read_bytes())
    assert file.stat().st_mode & 0o777 == 0o750
    assert run("--revert", trees)[0] == 0
    assert content_of(trees) == before


def test_a_users_own_lines_are_kept_and_come_back(trees, run):
    file = trees / RANDOM
    file.write_text("# mine\n" + file.read_text())
    before = content_of(trees)
    assert run(trees)[0] == 0
    assert file.read_text().startswith("# mine\n") and "_sequence_boundaries" in file.read_text()
    assert run("--revert", trees)[0] == 0
    assert content_of(trees) == before


def test_revert_does_not_lose_a_change_made_after_applying(trees, run):
    before = content_of(trees)
    run(trees)
    file = trees / RANDOM
    file.write_text(file.read_text() + "# mine\n")
    code, table, _ = run("--check", trees)
    assert code == 0 and "changed elsewhere since" in table
    assert run(trees)[0] == 0 and file.read_text().endswith("# mine\n")
    code, _, error = run("--revert", trees)
    assert code == 2 and RANDOM in error
    assert file.read_text().endswith("# mine\n")
    for command_line in re.findall(r"\((cp [^)]*)\)", error):
        subprocess.run(command_line.split(), check=True)
    assert run("--revert", trees)[0] == 0
    assert content_of(trees) == before


def test_an_edit_that_was_undone_by_hand_is_seen(trees, run):
    original = (trees / RANDOM).read_text()
    run(trees)
    (trees / RANDOM).write_text(original + "# newer\n")
    refused(run, trees, RANDOM, "does not hold the edit any more", ".mm_rl_patches")
    (trees / RANDOM).write_text(original)
    assert run("--check", trees)[0] == 3
    assert run(trees)[0] == 0
    assert "_sequence_boundaries" in (trees / RANDOM).read_text()


def test_an_anchor_that_is_not_there_once_is_refused_in_all_trees(trees, run):
    file = trees / WORKER
    file.write_text(file.read_text().replace("batch_data and index", "batch_data"))
    refused(run, trees, WORKER, "expected exactly one place with `if batch_data and index:`", "found 0")
    file.write_text(file.read_text().replace("batch_data", "batch_data and index") * 2)
    refused(run, trees, "found 2")


def test_what_is_contained_is_not_edited(trees, run):
    file = trees / WORKER
    file.write_text(file.read_text().replace("while True:\n", "while True:\n            gc.collect()\n"))
    before = file.read_bytes()
    code, table, _ = run(trees)
    assert code == 0
    assert re.search(r"contained +empty_cache", table)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("megatron/core/package_info.py", "MAJOR = 0\nMINOR = 16\nPATCH = 1\n", "Megatron-LM core 0.16.1"),
        ("megatron/core/package_info.py", "", "Megatron-LM unknown"),
        ("mindspeed/core/context_parallel/dot_product_attention.py", "pg_collection", "MindSpeed core 0.13 or newer"),
        ("mindspeed/core/context_parallel/dot_product_attention.py", "", "MindSpeed unknown"),
        (
            "mindspeed_rl/trainer/utils/mm_transfer_dock.py",
            "def get_experience(\n  self,\n  consumer: str)",
            "MindSpeed-RL newer than 2.3.0",
        ),
        ("mindspeed_rl/trainer/utils/mm_transfer_dock.py", "", "MindSpeed-RL 2.0.0 or older"),
    ],
)
def test_an_unknown_version_is_refused_with_what_is_expected(trees, run, name, text, found):
    (trees / name).write_text(text)
    refused(run, trees, found, "expected", "nothing was changed")
    assert run("--check", trees)[0] == 2


def test_trees_of_different_cores_are_refused_together_and_not_alone(trees, run):
    (trees / "mindspeed_rl/trainer/dapo_trainer_hybrid.py").unlink()
    error = refused(run, trees, "MindSpeed-RL 2.1.0, GRPO only, for core 0.8", "core_v0.12.1", "d9212e1")
    assert "5176c6f" in error
    assert run(trees / "mindspeed")[0] == 0
    assert run("--revert", trees)[0] == 0


def test_read_only_files_and_folders_are_refused_before_any_change(trees, run):
    for path in (trees / WORKER, (trees / WORKER).parent):
        mode = path.stat().st_mode
        path.chmod(mode & ~0o222)
        refused(run, trees, f"{path} is read-only", "chmod u+w")
        path.chmod(mode)
    assert run(trees)[0] == 0


def test_a_full_disk_changes_nothing(trees):
    before = content_of(trees)
    no_byte_more = ["bash", "-c", 'ulimit -f 0; exec bash "$@"', "-", str(SCRIPT), str(trees)]
    done = subprocess.run(no_byte_more, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "File too large" in done.stderr and "--revert" in done.stderr
    assert content_of(trees) == before


def test_trees_are_found_below_a_folder_once_whatever_links_lead_there(trees, tmp_path, run):
    (tmp_path / "link").symlink_to(trees)
    (tmp_path / "too/deep/for/it").mkdir(parents=True)
    code, table, _ = run("--check", tmp_path)
    assert code == 3
    assert [table.count(f"{kind.name} ") for kind in KINDS] == [1, 1, 1]
    assert run("--check", trees / "megatron/core")[1].count("not applied") == 1
    code, _, error = run(tmp_path / "too")
    assert code == 2 and "no known tree" in error and "megatron/core/package_info.py" in error
    assert "is not a folder" in run(tmp_path / "nothing")[2]


def test_a_file_that_links_out_of_its_tree_is_refused(trees, tmp_path, run):
    file = trees / RANDOM
    elsewhere = tmp_path / "random.py"
    elsewhere.write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(elsewhere)
    refused(run, trees, str(elsewhere), "name the tree that holds it")
    assert file.is_symlink()


def test_a_damaged_backup_is_refused(trees, run):
    run(trees)
    next((trees / "mindspeed_rl/.mm_rl_patches/originals").rglob("*.py")).write_text("")
    refused(run, trees, "missing or damaged")
    code, _, error = run("--revert", trees)
    assert code == 2 and "missing or damaged" in error
    assert "_sequence_boundaries" not in (trees / RANDOM).read_text(), "the other trees are put back all the same"


def test_edits_of_another_version_of_the_script_are_replaced(trees, run):
    before, original = content_of(trees), (trees / RANDOM).read_bytes()
    older = replace(RECOMPUTE, replacements=RECOMPUTE.replacements[:2])
    Backup(trees / "megatron/core", [older.path]).apply({older.path: Change(original, apply_edit(older, original) or b"")})
    code, table, _ = run("--check", trees)
    assert code == 3 and "outdated" in table
    assert run(trees)[0] == 0
    assert "with torch.enable_grad(), _sequence_boundaries" in (trees / RANDOM).read_text()
    run("--revert", trees)
    assert content_of(trees) == before


def test_two_runs_at_once_are_refused(trees, run):
    descriptor = os.open(trees / "mindspeed", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    refused(run, trees, "another run of this script works on")
    os.close(descriptor)
    assert run(trees)[0] == 0


def test_the_script_needs_no_environment_and_works_on_the_current_folder(trees, tmp_path):
    """A folder called patches in the current folder is not taken for ours, and a path may hold spaces."""
    (trees / "patches").mkdir()
    (trees / "patches/__init__.py").write_text("raise SystemExit('not this one')\n")
    trees = trees.rename(tmp_path / "my trees")
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(trees)}
    done = subprocess.run(["bash", str(SCRIPT)], cwd=trees, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("  applied ") == 5
