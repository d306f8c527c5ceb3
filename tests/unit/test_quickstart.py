"""The quick start's task can be learned from the pictures alone, and its verdict says when it was not."""

import random
import subprocess
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "rl" / "quickstart"


@pytest.fixture(autouse=True)
def scripts_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(QUICKSTART))


def test_answers_are_balanced_and_no_picture_repeats():
    import pictures

    answers = pictures.balanced_answers(random.Random(0), 64)
    assert set(Counter(answers).values()) == {4} and len(set(answers)) == 16
    seen: set[bytes] = set()
    drawn = list(pictures.new_pictures(random.Random(0), answers, seen))
    assert len(set(drawn)) == len(seen) == 64


def test_rows_have_the_schema_of_geometry3k_and_no_number_in_the_text(tmp_path):
    import pictures

    pictures.write_split(tmp_path / "train.parquet", [35, 80], pictures.new_pictures(random.Random(1), [35, 80], set()))
    rows = pq.read_table(tmp_path / "train.parquet").to_pylist()
    assert [row["answer"] for row in rows] == ["35", "80"]
    assert all(row["problem"] == "<image>Find x." and row["images"][0]["bytes"][:4] == b"\x89PNG" for row in rows)


def test_solution_is_right_and_in_the_graded_format():
    import pictures

    assert pictures.solution(55) == "<think> 90 - 35 = 55 </think> \\boxed{55}"


def test_every_token_id_of_the_tiny_vocabulary_is_a_token_and_digits_stand_alone():
    import tiny_model
    from pictures import ANSWERS, solution

    tokenizer = tiny_model.make_tokenizer(["Find x. Put the answer in \\boxed{}."])
    assert len(tokenizer) == tiny_model.VOCABULARY == len(tokenizer.get_vocab())
    for answer in ANSWERS:
        token_ids = tokenizer(solution(answer)).input_ids
        assert tokenizer.decode(token_ids) == solution(answer)
        assert tokenizer.convert_ids_to_tokens(token_ids)[-3:] == [*str(answer), "}"]


def test_verdict_complains_of_little_gain_and_of_answers_without_pictures():
    import verdict

    def result(after: float, blanked: float) -> dict:
        before = {"sampled": 0.3, "greedy": 0.4}
        end = {"sampled": after, "greedy": after, "blanked_sampled": 0.06, "blanked_greedy": blanked}
        return {"chance": 0.0625, "models": {"before": before, "after": end}}

    assert verdict.complaints(result(after=0.8, blanked=0.06)) == []
    assert verdict.complaints(result(after=0.65, blanked=0.06)) == ["greedy accuracy rose by 25 points, 30 were expected"]
    assert "without pictures" in verdict.complaints(result(after=0.8, blanked=0.2))[0]


def test_unknown_verb_of_the_test_script_is_refused():
    done = subprocess.run(["bash", "scripts/test.sh", "unti"], cwd=QUICKSTART.parents[2], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "unknown verb 'unti'" in done.stderr
