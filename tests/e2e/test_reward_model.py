"""The process of a reward model: its scores in the pool, and what becomes of one that can't score."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_mm_rl.rewards import model_process
from mindspeed_mm_rl.rewards.model import RewardModel
from mindspeed_mm_rl.rewards.pool import RewardPool
from mindspeed_mm_rl.rewards.scoring import RewardSettings
from tests.tiny import make_tiny_classifier

MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}]
RESPONSES = ["\\boxed{5}", "The answer is 5, since 2 + 3 = 5.", "", "no"]


def test_the_pool_adds_the_models_scores(tiny_text: Path, tmp_path: Path) -> None:
    classifier = str(make_tiny_classifier(tmp_path, tiny_text))
    rule = RewardSettings(("math_17k_acc", "reward_model"), (1.0, 0.5), 0, 1.0, 64, 1, 10.0, reward_model=classifier)
    with RewardPool(rule) as pool:
        pool.wait_ready()
        group = pool.submit(0, RESPONSES, [1] * 4, "5", messages=MESSAGES).result(timeout=60)
        with pytest.raises(ValueError, match="prompt 1 of 'gsm8k' has token ids alone"):
            pool.submit(1, ["5"], [1], "5", "gsm8k")
    scores = group.scores["reward_model"]
    assert scores == pytest.approx(RewardModel(classifier).score(MESSAGES, RESPONSES), abs=1e-5)
    assert group.rewards == pytest.approx([1.0 + 0.5 * scores[0], *(0.5 * score for score in scores[1:])])
    assert group.model_interval is not None and group.model_interval[0] < group.model_interval[1]


FAULTY = """
from mindspeed_mm_rl.rewards import model
import os, time

class Faulty:
    def __init__(self, folder):
        if folder == "missing":
            raise ValueError("no weights in missing")
    def score(self, messages, responses):
        match responses[0]:
            case "dies": os.abort()
            case "sleeps": time.sleep(60)
            case "raises": raise KeyError("tower")
            case "nan": return [float("nan")]
            case "dies once" if not os.path.exists(messages[0]["content"]):
                open(messages[0]["content"], "w").close()
                os.abort()
        return [1.0] * len(responses)

model.RewardModel = Faulty
"""


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    boot, main = model_process._BOOT.rsplit("; ", 1)
    monkeypatch.setattr(model_process, "_BOOT", f"{boot}; exec({FAULTY!r}); {main}")


def test_a_model_that_fails_scores_zero_and_ends_the_run_when_it_goes_on_failing(faulty, tmp_path):
    process = model_process.ModelProcess("folder", 0.5)
    process.ready.result(timeout=60)

    def ask(text: str) -> model_process.ModelScores:
        return process.submit(7, [{"role": "user", "content": str(tmp_path / "died")}], [text, "b"]).result(timeout=60)

    try:
        assert ask("fine").scores == ask("dies once").scores == [1.0, 1.0]
        faults = {text: ask(text) for text in ("sleeps", "raises")}
        assert all(fault.scores == [0.0, 0.0] for fault in faults.values())
        assert [(fault.timeouts, fault.crashes) for fault in faults.values()] == [(2, 0), (0, 2)]
        with pytest.raises(RuntimeError, match=r"the reward model folder failed on prompt 7: its process ended \(exit code -6\)"):
            ask("dies")
        assert ask("fine").scores == [1.0, 1.0]
        assert ask("nan").crashes == 2
    finally:
        process.close()


def test_a_model_that_cannot_be_loaded_is_the_users_to_mend(faulty):
    process = model_process.ModelProcess("missing", 5.0)
    with pytest.raises(ValueError, match="no weights in missing"):
        process.ready.result(timeout=60)
    process.close()
