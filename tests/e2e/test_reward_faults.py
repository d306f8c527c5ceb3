"""Reward functions that hang, raise, crash or eat memory: their samples get the lowest score and are counted, the others are as before."""

from __future__ import annotations

import time

import pytest

from mindspeed_mm_rl.rewards import patience as patience_module
from mindspeed_mm_rl.rewards import pool as pool_module
from mindspeed_mm_rl.rewards.pool import RewardPool
from mindspeed_mm_rl.rewards.scoring import RewardSettings

GOOD = "<think>Angles add up to 180.</think> So \\boxed{55}"
FAULTS = """
import ctypes, itertools, os, signal, time
from mindspeed_mm_rl.rewards import worker
grade = worker.score_sample

def fault(text, *rest):
    match text.partition(" ")[0]:
        case "loops":
            sum(0 for _ in itertools.count())
        case "sleeps":
            time.sleep(1000)
        case "raises":
            raise KeyError(text)
        case "aborts":
            os.abort()
        case "exits":
            os._exit(0)
        case "segfaults":
            ctypes.string_at(0)
        case "eats":
            [bytearray(1 << 24) for _ in itertools.count()]
        case "recurses":
            fault(text)
        case "scores_nan":
            return type(grade(text, *rest))({"geo3k": float("nan")}, 0.0)
        case "scores_text":
            return type(grade(text, *rest))({"geo3k": b"1"}, 0.0)
        case "is_killed":
            os.kill(os.getpid(), signal.SIGKILL)
    return grade(text, *rest)

worker.score_sample = fault
"""


def plant(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    boot, main = pool_module._BOOT.rsplit("; ", 1)
    monkeypatch.setattr(pool_module, "_BOOT", f"{boot}; exec({code!r}); {main}")


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, FAULTS)


def pool_of(workers: int = 1, timeout_seconds: float = 20.0, verifier: str = "geo3k") -> RewardPool:
    pool = RewardPool(RewardSettings((verifier,), (1.0,), 0, 1.0, 2048, workers, timeout_seconds))
    pool.wait_ready()
    return pool


def grade(pool: RewardPool, texts: list[str]) -> tuple[list[float], int, int]:
    group = pool.submit(7, texts, [1] * len(texts), "55", "geometry3k").result(timeout=120)
    return group.rewards, group.timeouts, group.crashes


def test_a_crash_is_the_lowest_score_of_its_sample_alone(faulty):
    with pool_of() as pool:
        faults = ["raises", "recurses", "scores_nan", "scores_text", "aborts", "exits", "segfaults", "eats", "is_killed"]
        assert grade(pool, [GOOD, *faults, "\\boxed{55}"]) == ([1.0] + [0.0] * 9 + [0.9], 0, 9)
        assert grade(pool, [GOOD]) == ([1.0], 0, 0)


def test_a_hang_is_the_lowest_score_of_its_sample_alone(faulty):
    """The lowest score is the verifier's own."""
    with pool_of(timeout_seconds=1.0, verifier="acc_for_dapo") as pool:
        assert grade(pool, ["Answer: 55", "loops", "sleeps", "raises", "Answer: 55"]) == ([1.0, -1.0, -1.0, -1.0, 1.0], 2, 1)


def test_verifiers_that_raise_are_told_once_and_end_the_run_when_nothing_else_happens(faulty, caplog):
    """Zeros for ever would look like a model that learns nothing."""
    with pool_of() as pool:
        assert grade(pool, [GOOD, "raises one", "raises two"]) == ([1.0, 0.0, 0.0], 0, 2)
        (told,) = [record.message for record in caplog.records]
        assert "failed on sample 1 of prompt 7 of 'geometry3k'" in told and "KeyError: 'raises one'" in told and "rewards/crashes" in told
        for _ in range(3):
            assert grade(pool, [GOOD] + ["raises"] * 63)[2] == 63
        with pytest.raises(RuntimeError, match="(?s)failed on sample 0 of prompt 7 .*KeyError: 'raises 64 times'"):
            grade(pool, ["raises 64 times"])
    assert len(caplog.records) == 1


KILLED_ONCE = """
import os, signal
from mindspeed_mm_rl.rewards import worker
grade = worker.score_sample

def fault(text, *rest):
    if text.startswith("unlucky") and not os.path.exists({flag!r}):
        open({flag!r}, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return grade(text, *rest)

worker.score_sample = fault
"""


def test_a_worker_that_something_else_killed_tries_the_sample_again(tmp_path, monkeypatch):
    """An innocent sample on a machine that has run out of memory."""
    plant(monkeypatch, KILLED_ONCE.format(flag=str(tmp_path / "killed")))
    with pool_of() as pool:
        assert grade(pool, [GOOD, f"unlucky {GOOD}", GOOD]) == ([1.0, 0.9, 1.0], 0, 0)
    assert (tmp_path / "killed").exists()


def test_many_hanging_samples_at_once_do_not_stop_the_run(faulty, monkeypatch):
    """On one worker, 5 of 261 hang with a bound of 2 s; without patience they alone would take 10 s."""
    monkeypatch.setattr(patience_module, "_LEAST_SECONDS", 0.5)
    with pool_of(timeout_seconds=2.0) as pool:
        start = time.monotonic()
        hanging = pool.submit(32, ["loops"] * 5, [1] * 5, "55")
        groups = [pool.submit(p, [GOOD] * 8, [1] * 8, "55") for p in range(32)]
        assert all(group.result(timeout=60).rewards == [1.0] * 8 for group in groups)
        assert (hanging.result().rewards, hanging.result().timeouts) == ([0.0] * 5, 5)
        # 2 + 4 x 0.5 s of waiting, and 5 starts of a worker.
        assert time.monotonic() - start < 9.0
