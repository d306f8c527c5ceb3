"""Generated preference pairs: sums that go wrong on the way, and pictures without which nobody can tell which answer is right."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from mindspeed_mm_rl.data.images import load_image
from mindspeed_mm_rl.data.pair_rows import IndexedPairs, PairColumns
from mindspeed_mm_rl.data.sources import open_rows
from tests.data_files import png, row, write_rows

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "rl" / "quickstart"


@pytest.fixture(autouse=True)
def scripts_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(QUICKSTART))
    # Another test may have its own `pictures`.
    for name in ("pictures", "picture_pairs", "sum_pairs", "sums"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_the_rejected_sum_is_a_solution_that_slips(tmp_path):
    import sum_pairs
    import sums

    sums.write_splits(tmp_path / "data", seed=0)
    for name in ("a", "b"):
        sum_pairs.write_pairs(tmp_path / "data" / "rl", tmp_path / name, seed=0)
    assert (tmp_path / "a/train.jsonl").read_bytes() == (tmp_path / "b/train.jsonl").read_bytes()
    rows = open_rows(tmp_path / "a", PairColumns(), IndexedPairs)
    assert len(rows) == sums.SPLITS["rl/train"]
    wrong_lines = 0
    for pair in (rows[number] for number in range(50)):
        chain = sums.parse(pair.messages[0]["content"])
        assert pair.chosen == sums.solution(chain)
        lines = [re.fullmatch(r"(-?\d+)([+-]\d+)=(-?\d+)", line).groups() for line in pair.rejected.partition("\\boxed")[0].split(",")]
        assert [int(change) for _, change, _ in lines] == list(chain.changes)
        wrong = sum(int(total) + int(change) != int(result) for total, change, result in lines)
        assert wrong >= 1
        wrong_lines += wrong
    assert wrong_lines < 100, "most lines of a rejected solution are right"


def test_without_the_pictures_nothing_tells_which_answer_is_right(tmp_path, monkeypatch):
    import picture_pairs
    from pictures import ANSWERS, solution

    answers = [answer for answer in ANSWERS for _ in range(19)]
    drawn = png(56, 84)
    rows = [row(images=[drawn], answer=str(answer)) for answer in answers]
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.parquet", rows)
    monkeypatch.setattr(sys, "argv", ["picture_pairs.py", "--data", str(tmp_path), "--out", str(tmp_path / "pairs")])
    picture_pairs.main()
    pairs = open_rows(tmp_path / "pairs" / "test.parquet", PairColumns(), IndexedPairs)
    assert [pair.chosen for pair in (pairs[number] for number in range(0, 304, 19))] == [solution(answer) for answer in ANSWERS]
    ways = Counter((pairs[number].chosen, pairs[number].rejected) for number in range(len(pairs)))
    assert all(chosen != rejected and ways[rejected, chosen] == count for (chosen, rejected), count in ways.items())
    assert len(ways) == 16 * 15
    blank = open_rows(tmp_path / "pairs" / "test_blank.parquet", PairColumns(), IndexedPairs)
    assert (blank[5].messages, blank[5].chosen, blank[5].rejected) == (pairs[5].messages, pairs[5].chosen, pairs[5].rejected)
    paper = load_image(blank[5].images[0])
    assert (paper.size, paper.getcolors()) == ((84, 56), [(84 * 56, (255, 255, 255))])
    assert len(load_image(pairs[5].images[0]).getcolors(1 << 16)) > 2
