"""A user's own reward function: loaded in the grading processes alone, told apart from a response's fault, refused before training."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mindspeed_mm_rl.rewards import custom
from mindspeed_mm_rl.rewards.pool import RewardPool, check_functions
from mindspeed_mm_rl.rewards.scoring import Question, RewardSettings, score_sample

FILE = """
from bonus import BONUS

def plain(data_source, solution_str, ground_truth, extra_info):
    return float(solution_str == ground_truth)

def told(data_source, solution_str, ground_truth, extra_info=None, **more):
    if solution_str == "raises":
        raise KeyError(f"nothing in {data_source}")
    if solution_str == "nothing":
        return None
    score = BONUS * extra_info["level"]
    return {"score": score, "acc": solution_str == ground_truth, "words": len(solution_str.split()), "said": solution_str}

def few(solution_str, ground_truth):
    return 1.0

number = 7
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "bonus.py").write_text("BONUS = 0.25\n")
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


def settings(*verifiers: str) -> RewardSettings:
    return RewardSettings(verifiers, (1.0,) * len(verifiers), 0, 1.0, 64, 1, 10.0)


def test_what_a_function_returns(file):
    sample = score_sample("5", Question("5", "gsm8k", {"level": 2}), [f"{file}:plain", f"{file}:told"])
    assert sample.scores == {"plain": 1.0, "told": 0.5}
    assert sample.metrics == {"told/acc": 1.0, "told/words": 1.0}
    assert sample.accuracy == 1.0
    wrong = score_sample("6", Question("5", "gsm8k", {"level": 8}), [f"{file}:told"])
    assert (wrong.scores, wrong.accuracy) == ({"told": 2.0}, 0.0)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nowhere.py:f", "nowhere.py does not exist"),
        ("mine.py", "'mine.py' must be path/to/file.py:name"),
        ("mine.py:missing", "mine.py has no function 'missing'"),
        ("mine.py:number", "mine.py has no function 'number'"),
        ("mine.py:few", r"mine.py:few must take \(data_source, solution_str, ground_truth, extra_info\), but got an unexpected keyword"),
        ("broken.py:f", r"broken.py can't be imported \(SyntaxError"),
        ("raising.py:f", r"raising.py can't be imported \(ZeroDivisionError"),
    ],
)
def test_functions_that_cannot_be_used_are_refused(file, monkeypatch, spec, words):
    (file.parent / "broken.py").write_text("def f(:\n")
    (file.parent / "raising.py").write_text("1 / 0\n")
    monkeypatch.chdir(file.parent)
    custom.load.cache_clear()
    with pytest.raises(ValueError, match=words):
        custom.load(spec)


@pytest.mark.parametrize("returned", ["None", "'much'", "float('nan')", "{'acc': 1.0}", "{'score': None}"])
def test_what_is_no_number_is_no_reward(tmp_path, returned):
    (tmp_path / f"odd_{abs(hash(returned))}.py").write_text(
        f"def f(data_source, solution_str, ground_truth, extra_info):\n    return {returned}\n"
    )
    with pytest.raises(ValueError, match="f returned "):
        custom.grade(f"{next(tmp_path.glob('odd*.py'))}:f", "", "", "", {})


def test_functions_grade_in_the_pool_and_what_they_raise_is_counted(file, caplog):
    """The warning names file, line and sample; the sample scores 0."""
    with RewardPool(settings(f"{file}:told")) as pool, caplog.at_level(logging.WARNING):
        pool.wait_ready()
        group = pool.submit(7, ["5", "raises", "nothing", "a b"], [1] * 4, "5", "gsm8k", {"level": 4, "when": file}).result(timeout=60)
    assert (group.scores, group.rewards, group.accuracy) == ({"told": [1.0, 0.0, 0.0, 1.0]}, [1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0])
    assert group.metrics == {"told/acc": [1.0, 0.0], "told/words": [1.0, 2.0]}
    assert (group.timeouts, group.crashes) == (0, 2)
    (told,) = [record.message for record in caplog.records]
    assert "sample 1 of prompt 7 of 'gsm8k'" in told and f'{file}", line 9, in told' in told and "KeyError: 'nothing in gsm8k'" in told


def test_the_driver_learns_of_a_wrong_function_without_loading_it(file):
    with pytest.raises(ValueError, match="mine.py has no function 'missing'"):
        check_functions(settings(f"{file}:missing"))
    check_functions(settings("acc"))
