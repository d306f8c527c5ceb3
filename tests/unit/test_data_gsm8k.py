"""Rows of GSM8K: what is asked, what is shown, and what counts as right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "rl" / "data_preprocess"))
import gsm8k  # noqa: E402

from mindspeed_mm_rl.data.rows import PromptColumns  # noqa: E402
from mindspeed_mm_rl.data.sources import ParquetRows  # noqa: E402
from mindspeed_mm_rl.rewards.math import math_17k_acc_score  # noqa: E402

ROWS = [
    {"question": "A ball costs $600. What do 2 cost? ", "answer": "2*600=<<2*600=1200>>1200\n#### 1,200"},
    {"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"},
    {"question": "How many legs have 3 dogs?", "answer": "3*4=<<3*4=12>>12 legs\n#### 12"},
]


def converted(folder: Path, *more: str, suffix: str = ".jsonl") -> ParquetRows:
    source = folder / f"source{suffix}"
    if suffix == ".jsonl":
        source.write_text("\n".join(json.dumps(row) for row in ROWS))
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), source)
    assert gsm8k.main(["--local_data", str(source), "--output", str(folder / "out" / "train.parquet"), *more]) == 0
    return ParquetRows(folder / "out", PromptColumns())


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_row_asks_and_knows_the_answer(suffix, tmp_path, capsys):
    rows = converted(tmp_path, suffix=suffix)
    assert len(rows) == 3 and "3 rows" in capsys.readouterr().out
    assert rows[0].messages == ({"role": "user", "content": "A ball costs $600. What do 2 cost? Put the final answer in \\boxed{}."},)
    assert (rows[0].answer, rows[0].data_source) == ("1200", "openai/gsm8k")


def test_shots_are_shown_and_not_trained_on(tmp_path):
    rows = converted(tmp_path, "--shots", "1")
    assert [row.answer for row in (rows[0], rows[1])] == ["1200", "12"] and len(rows) == 2
    asked, solved, question = rows[1].messages
    assert asked["content"].startswith("1+1? Put") and question["content"].startswith("How many legs")
    assert solved == {"role": "assistant", "content": "1+1=2\n\\boxed{2}"}
    assert math_17k_acc_score(solved["content"], "2") == 1.0


def test_what_no_row_can_be_made_of_is_named(tmp_path, capsys):
    (tmp_path / "cut.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"question": "1+')
    (tmp_path / "bad.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({"question": "1+1?", "answer": "2"}))
    for file, more, message in (
        ("bad.jsonl", [], "bad.jsonl, row 1: a row needs a question, and an answer that ends in '#### <number>'"),
        ("nowhere.jsonl", [], "nowhere.jsonl does not exist"),
        ("cut.jsonl", [], "cut.jsonl, line 2: not valid JSON"),
    ):
        assert gsm8k.main(["--local_data", str(tmp_path / file), "--output", str(tmp_path / "train.parquet"), *more]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "train.parquet").exists()
    (tmp_path / "good.jsonl").write_text(json.dumps(ROWS[0]))
    assert gsm8k.main(["--local_data", str(tmp_path / "good.jsonl"), "--output", str(tmp_path / "bad.jsonl" / "train.parquet")]) == 2
    assert "--output" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--shots 3 must be at least 0 and less than the 3 rows"):
        gsm8k.training_rows(ROWS, 3)
