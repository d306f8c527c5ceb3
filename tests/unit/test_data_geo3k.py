"""geo3k.py: the rows it writes, which files it takes for which split, and what it says when something is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data_files import SCRIPTS, png, run_geo3k


def source_rows(count, name="q", **columns):
    image = {"bytes": png(28, 28), "path": None}
    return [{"images": [image], "problem": f"<image>{name}{i}", "answer": str(i)} | columns for i in range(count)]


def write(path: Path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def questions(path: Path):
    return [row["extra_info"]["question"] for row in pq.read_table(path).to_pylist()]


def refused(capsys, *arguments):
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert run_geo3k(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("geo3k.py:")]
    assert len(lines) == 1
    return lines[0]


def test_rows_are_those_that_users_know(tmp_path):
    write(tmp_path / "in" / "train.parquet", source_rows(2))
    write(tmp_path / "in" / "test.parquet", source_rows(1, "t"))
    assert run_geo3k("--local_data", tmp_path / "in", "--local_dir", tmp_path / "deep" / "out") == 0
    table = pq.read_table(tmp_path / "deep" / "out" / "train.parquet")
    assert table.column_names == ["data_source", "prompt", "images", "ability", "reward_model", "extra_info"]
    assert table.to_pylist()[1] == {
        "data_source": "hiyouga/geometry3k",
        "prompt": [
            {
                "role": "user",
                "content": "<image>q1 You FIRST think about the reasoning process as an internal monologue and then provide the final "
                "answer. The reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \\boxed{}.",
            }
        ],
        "images": [{"bytes": png(28, 28), "path": None}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "1"},
        "extra_info": {"split": "train", "index": 1, "answer": "1", "question": "<image>q1"},
    }
    assert pq.read_table(tmp_path / "deep" / "out" / "test.parquet").to_pylist()[0]["extra_info"]["split"] == "test"
    assert sorted(path.name for path in (tmp_path / "deep" / "out").iterdir()) == ["test.parquet", "train.parquet"]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "in" / "train.parquet", source_rows(1))
    assert run_geo3k("--local_data", "~/in") == 0
    assert (tmp_path / "data" / "geo3k" / "train.parquet").is_file()


@pytest.mark.parametrize(
    ("train", "test", "taken"),
    [
        (["train.parquet"], ["test_dev.parquet", "validation.parquet"], ("train.parquet", "test_dev.parquet")),
        (["train.parquet", "train_official10.parquet"], ["test.parquet", "test_dev.parquet"], ("train.parquet", "test.parquet")),
        (
            ["data/train-00000-of-00001.parquet"],
            ["data/validation-00000-of-00001.parquet"],
            ("data/train-00000-of-00001.parquet", "data/val"),
        ),
        (["train_a.parquet"], ["data/test.parquet"], ("train_a.parquet", "data/test.parquet")),
    ],
)
def test_which_file_a_folder_gives(tmp_path, capsys, train, test, taken):
    for name in [*train, *test]:
        write(tmp_path / "in" / name, source_rows(1, name + ":"))
    assert run_geo3k("--local_data", tmp_path / "in", "--local_dir", tmp_path / "out") == 0
    assert questions(tmp_path / "out" / "train.parquet") == [f"<image>{taken[0]}:0"]
    assert questions(tmp_path / "out" / "test.parquet")[0].startswith(f"<image>{taken[1]}")
    assert "1 rows from" in capsys.readouterr().out


def test_all_shards_in_order(tmp_path):
    for shard in (1, 0):
        write(tmp_path / "in" / f"train-0000{shard}-of-00002.parquet", source_rows(2, f"s{shard}:"))
    assert run_geo3k("--local_data", tmp_path / "in", "--local_dir", tmp_path / "out") == 0
    assert questions(tmp_path / "out" / "train.parquet") == ["<image>s0:0", "<image>s0:1", "<image>s1:0", "<image>s1:1"]
    assert [row["extra_info"]["index"] for row in pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()] == [0, 1, 2, 3]


def test_ambiguous_or_incomplete_folders_are_refused(tmp_path, capsys):
    for name in ("train_a", "train_b"):
        write(tmp_path / "two" / f"{name}.parquet", source_rows(1))
    write(tmp_path / "half" / "train-00000-of-00002.parquet", source_rows(1))
    out = ("--local_dir", tmp_path / "out")
    assert "several files for the split train (train_a.parquet, train_b.parquet)" in refused(capsys, "--local_data", tmp_path / "two", *out)
    assert "1 of 2 shards of the split train" in refused(capsys, "--local_data", tmp_path / "half", *out)
    assert "does not exist" in refused(capsys, "--local_data", tmp_path / "none", *out)
    (tmp_path / "empty").mkdir()
    assert "no training rows" in refused(capsys, "--local_data", tmp_path / "empty", *out)
    assert not (tmp_path / "out").exists()


def test_files_tell_their_split_by_name(tmp_path, capsys):
    files = [write(tmp_path / name, source_rows(1, name + ":")) for name in ("train_x.parquet", "test_y.parquet", "other.parquet")]
    assert run_geo3k("--local_data", *files[:2], "--local_dir", tmp_path / "out") == 0
    assert questions(tmp_path / "out" / "test.parquet") == ["<image>test_y.parquet:0"]
    assert "must begin with train, test or validation" in refused(capsys, "--local_data", *files, "--local_dir", tmp_path / "out")
    assert run_geo3k("--local_data", files[2], "--local_dir", tmp_path / "alone") == 0
    assert questions(tmp_path / "alone" / "train.parquet") == ["<image>other.parquet:0"]
    assert "no test split found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "row 70: the answer is missing"),
        ({"problem": "no marker"}, "row 70: the problem has 0 <image> markers but 1 images"),
        ({"images": [{"bytes": None, "path": "a.png"}]}, "row 70: an image has no bytes"),
    ],
)
def test_a_bad_row_is_named_and_what_was_there_stays(tmp_path, capsys, change, message):
    write(tmp_path / "in" / "train.parquet", source_rows(2))
    write(tmp_path / "in" / "test.parquet", source_rows(2))
    assert run_geo3k("--local_data", tmp_path / "in", "--local_dir", tmp_path / "out") == 0
    rows = source_rows(80, "new")
    rows[70] |= change
    write(tmp_path / "in" / "test.parquet", rows)
    write(tmp_path / "in" / "train.parquet", source_rows(3, "new"))
    assert message in refused(capsys, "--local_data", tmp_path / "in", "--local_dir", tmp_path / "out")
    assert questions(tmp_path / "out" / "train.parquet") == ["<image>q0", "<image>q1"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test.parquet", "train.parquet"]


def test_files_of_another_kind_are_named(tmp_path, capsys):
    write(tmp_path / "train.parquet", [{"problem": "a", "answer": "b"}])
    assert "train.parquet lacks the column images; it has problem, answer" in refused(capsys, "--local_data", tmp_path)
    write(tmp_path / "train.parquet", [{"problem": "<image>a", "answer": "b", "images": ["a.png"]}])
    assert "column images must be a list of {bytes, path}, not list" in refused(capsys, "--local_data", tmp_path)
    (tmp_path / "train.parquet").write_bytes(b"noise")
    assert "train.parquet is not a readable parquet file" in refused(capsys, "--local_data", tmp_path)


def test_the_written_features_are_images_to_the_datasets_library(tmp_path):
    write(tmp_path / "in" / "train.parquet", source_rows(1))
    run_geo3k("--local_data", tmp_path / "in", "--local_dir", tmp_path / "out")
    from datasets import Features

    features = Features.from_arrow_schema(pq.read_schema(tmp_path / "out" / "train.parquet"))
    assert type(features["images"].feature).__name__ == "Image"
    assert features["extra_info"]["index"].dtype == "int64"


def test_the_real_folder(data_dir, tmp_path):
    assert run_geo3k("--local_data", data_dir / "geometry3k", "--local_dir", tmp_path) == 0
    written = {split: pq.read_table(tmp_path / f"{split}.parquet") for split in ("train", "test")}
    assert (written["train"].num_rows, written["test"].num_rows) == (500, 92)
    source = pq.read_table(data_dir / "geometry3k" / "test_dev.parquet")
    assert written["test"]["images"].to_pylist() == source["images"].to_pylist()
    assert [row["answer"] for row in written["test"]["extra_info"].to_pylist()] == source["answer"].to_pylist()


def test_no_network_ends_in_one_sentence(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, SCRIPTS / "geo3k.py", "--local_dir", tmp_path / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("geo3k.py: can't download hiyouga/geometry3k (")
    assert done.stderr.endswith("without network, pass its parquet files with --local_data FOLDER\n")
    assert done.stderr.count("\n") == 1
