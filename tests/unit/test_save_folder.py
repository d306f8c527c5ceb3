"""Saves are whole or not there: manifest, fallback, what a kill leaves behind. Small files stand for weights."""

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_mm_rl.trainer.save_folder import ACTOR_FOLDER, BEST_TRACKER, STATE_FILE, TRACKER, SaveFolder, check_whole, write_state

SHARD = 2**20 + 1  # too large to be hashed


def write_save(saves: SaveFolder, iteration: int, written: float | None = None) -> Path:
    with saves.new_save(iteration) as folder:
        (folder / ACTOR_FOLDER / ".metadata").write_bytes(b"shapes")
        (folder / ACTOR_FOLDER / "__0_0.distcp").write_bytes(bytes(SHARD))
        state = {"iteration": iteration, "written": iteration if written is None else written, "data": {}, "kl_controller": {}}
        write_state(folder, state)
    return saves.path_of(iteration)


@pytest.fixture
def saves(tmp_path: Path) -> SaveFolder:
    """Iterations 2, 4 and 6; the text file names the last one."""
    saves = SaveFolder(tmp_path / "save")
    for iteration in (2, 4, 6):
        write_save(saves, iteration)
    return saves


def names(saves: SaveFolder) -> list[str]:
    return sorted(path.name for path in saves.root.iterdir())


def test_a_save_is_whole_private_and_named(saves: SaveFolder) -> None:
    assert names(saves) == ["iter_0000002", "iter_0000004", "iter_0000006", TRACKER]
    assert (saves.root / TRACKER).read_text() == "6\n"
    assert saves.newest_whole() == (saves.path_of(6), [])
    listed = check_whole(saves.path_of(6))["files"]
    assert listed.keys() == {"actor/.metadata", "actor/__0_0.distcp"}
    assert listed["actor/__0_0.distcp"] == {"bytes": SHARD}
    for path in [saves.root, *saves.root.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


def test_the_text_file_picks_a_save(saves: SaveFolder) -> None:
    (saves.root / TRACKER).write_text("4")
    assert saves.newest_whole() == (saves.path_of(4), [])
    (saves.root / TRACKER).write_text("release\n")
    assert saves.newest_whole() == (None, [])


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def change(path: Path) -> None:
    path.write_bytes(b"X" + path.read_bytes()[1:])


def forget(save: Path, key: str, inside: str = "") -> None:
    state = json.loads((save / STATE_FILE).read_text())
    del (state[inside] if inside else state)[key]
    (save / STATE_FILE).write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda save: (save / ACTOR_FOLDER / "__0_0.distcp").unlink(), "actor/__0_0.distcp is missing"),
        (lambda save: shorten(save / ACTOR_FOLDER / "__0_0.distcp"), f"actor/__0_0.distcp has {SHARD - 1} bytes, {SHARD} were written"),
        (lambda save: change(save / ACTOR_FOLDER / ".metadata"), "actor/.metadata is not what was written"),
        (lambda save: (save / STATE_FILE).unlink(), "it has no state.json"),
        (lambda save: shorten(save / STATE_FILE), "state.json cannot be read"),
        (lambda save: (save / STATE_FILE).write_text("[]"), "state.json lacks iteration, "),
        (lambda save: forget(save, "data"), "state.json lacks data"),
        (lambda save: forget(save, "files"), "state.json lacks files"),
        (lambda save: forget(save, "actor/.metadata", inside="files"), "lists no actor/.metadata"),
        (lambda save: shutil.rmtree(save / ACTOR_FOLDER), "is missing"),
        (lambda save: shutil.rmtree(save), "it has no state.json"),
    ],
)
def test_a_save_that_is_not_whole_is_passed_over(saves: SaveFolder, damage, words: str) -> None:
    damage(saves.path_of(6))
    chosen, reasons = saves.newest_whole()
    assert chosen == saves.path_of(4)
    assert len(reasons) == 1 and reasons[0].startswith(f"{saves.path_of(6)} is no whole training save: ") and words in reasons[0]
    with pytest.raises(ValueError, match="iter_0000006 is no whole training save"):
        check_whole(saves.path_of(6))


def test_no_save_is_whole(saves: SaveFolder) -> None:
    for iteration in (2, 4, 6):
        (saves.path_of(iteration) / STATE_FILE).unlink()
    chosen, reasons = saves.newest_whole()
    assert chosen is None and len(reasons) == 3


def test_the_newest_is_what_was_written_last(saves: SaveFolder) -> None:
    """Going on from iteration 2, a run abandoned 4 and 6, and wrote another 3."""
    write_save(saves, 3, written=9)
    assert saves.newest_whole() == (saves.path_of(3), [])
    (saves.root / TRACKER).unlink()
    assert saves.newest_whole() == (saves.path_of(3), [])
    (saves.root / TRACKER).write_text("none")
    chosen, reasons = saves.newest_whole()
    assert chosen == saves.path_of(3) and "says 'none', which is no iteration" in reasons[0]
    saves.remove_old(2)
    assert names(saves) == ["iter_0000003", "iter_0000006", TRACKER]


def test_the_best_save_stays_and_is_named(saves: SaveFolder) -> None:
    saves.point_at_best(2)
    saves.remove_old(1, best=2)
    assert names(saves) == sorted(["iter_0000002", "iter_0000006", BEST_TRACKER, TRACKER])
    assert (saves.root / BEST_TRACKER).read_text() == "2\n"
    write_save(saves, 8)
    saves.remove_old(2, best=8)
    assert names(saves) == sorted(["iter_0000006", "iter_0000008", BEST_TRACKER, TRACKER]), "the old best is one of many"
    saves.point_at_best(2)
    assert BEST_TRACKER not in names(saves), "there is no such save any more"
    saves.point_at_best(None)


def test_damage_does_not_push_out_what_is_whole(saves: SaveFolder) -> None:
    (saves.path_of(6) / STATE_FILE).write_text("")
    saves.remove_old(1)
    assert names(saves) == ["iter_0000004", "iter_0000006", TRACKER]


def test_a_block_that_fails_leaves_nothing(saves: SaveFolder) -> None:
    before = names(saves)
    for iteration in (6, 8):
        with pytest.raises(KeyboardInterrupt), saves.new_save(iteration) as folder:
            (folder / ACTOR_FOLDER / ".metadata").write_bytes(b"half")
            raise KeyboardInterrupt
    assert names(saves) == before
    assert saves.newest_whole() == (saves.path_of(6), [])


def test_a_replaced_save_is_never_gone(saves: SaveFolder) -> None:
    write_save(saves, 6, written=60)
    assert check_whole(saves.path_of(6))["written"] == 60
    assert names(saves) == ["iter_0000002", "iter_0000004", "iter_0000006", TRACKER]
    # A kill between the two renames of a replacement, during a removal, and during a write.
    saves.path_of(6).rename(saves.root / ".iter_0000006.replaced")
    saves.path_of(2).rename(saves.root / ".iter_0000002.removed")
    (saves.root / ".iter_0000006.5f0c.partial" / ACTOR_FOLDER).mkdir(parents=True)
    (saves.root / f".{TRACKER}.partial").write_text("")
    saves.mend()
    assert names(saves) == ["iter_0000004", "iter_0000006", TRACKER]
    assert saves.newest_whole() == (saves.path_of(6), [])


def test_a_replacement_that_is_stopped_half_way_is_undone(saves: SaveFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename = names(saves), Path.rename

    def stopped(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial") and target.name == "iter_0000006":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", stopped)
        write_save(saves, 6, written=60)
    saves.mend()
    assert names(saves) == before
    assert saves.newest_whole() == (saves.path_of(6), []) and check_whole(saves.path_of(6))["written"] == 6


def test_where_a_run_begins_is_where_it_begins_again(saves: SaveFolder, tmp_path: Path) -> None:
    saves.begin_at(saves.path_of(2), 2)
    assert saves.newest_whole() == (saves.path_of(2), [])
    saves.begin_at(None, 0)
    assert saves.newest_whole() == (None, [])
    new = SaveFolder(tmp_path / "new")
    new.root.mkdir()
    new.begin_at(None, 0)
    assert names(new) == []
    new.begin_at(saves.path_of(4), 4)
    assert new.newest_whole() == (new.path_of(4), []) and new.path_of(4).resolve() == saves.path_of(4)
    new.begin_at(saves.path_of(4), 4)
    write_save(new, 5)
    new.remove_old(1)
    assert names(new) == ["iter_0000005", TRACKER]
    check_whole(saves.path_of(4))
    write_save(new, 6)
    with pytest.raises(ValueError, match="which holds another iter_0000006: give actor_config.save a folder of its own"):
        new.begin_at(saves.path_of(6), 6)


def test_one_run_at_a_time(saves: SaveFolder) -> None:
    hold = "import sys; from pathlib import Path; from mindspeed_mm_rl.trainer.save_folder import SaveFolder\n"
    hold += "with SaveFolder(Path(sys.argv[1])).held(): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold, str(saves.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another run is working with .*/save; wait until it is over"), saves.held():
            pass
        other.kill()
    with saves.held():
        saves.mend()


def test_a_folder_that_is_not_there_has_no_saves(tmp_path: Path) -> None:
    saves = SaveFolder(tmp_path / "save")
    saves.mend()
    assert saves.newest_whole() == (None, [])
