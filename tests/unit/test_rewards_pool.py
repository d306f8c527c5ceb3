"""The reward pool against real processes: order, speed, routes, starts that fail."""

import os
import subprocess
import sys
import time
from concurrent.futures import Future

import pytest

from mindspeed_mm_rl.rewards import pool as pool_module
from mindspeed_mm_rl.rewards.pool import RewardPool
from mindspeed_mm_rl.rewards.scoring import RewardSettings

GOOD = "<think>Angles add up to 180.</think> So \\boxed{55}"


def settings(verifiers=("geo3k",), workers=1, timeout_seconds=20.0, **more):
    return RewardSettings(verifiers, (1.0,), 0, 1.0, 2048, workers, timeout_seconds, **more)


@pytest.fixture(scope="module")
def pool():
    with RewardPool(settings(workers=2, by_source=(("gsm8k", ("acc", "step"), (1.0, 3.0)),))) as pool:
        pool.wait_ready()
        yield pool


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_a_group_comes_back_in_its_order(pool):
    future = pool.submit(3, [GOOD, "\\boxed{55}", "no"], [1, 2, 3], "55", "geo")
    assert isinstance(future, Future)
    group = future.result(timeout=30)
    assert group.rewards == [1.0, 0.9, 0.0]
    assert group.scores == {"geo3k": [1.0, 0.9, 0.0], "geo3k_acc": [1.0, 1.0, 0.0], "geo3k_format": [1.0, 0.0, 0.0]}
    assert (group.accuracy, group.timeouts, group.crashes) == ([1.0, 1.0, 0.0], 0, 0)


def test_a_source_is_graded_by_its_own_verifiers(pool):
    futures = [pool.submit(p, ["1. \\boxed{5}", "5"], [1, 1], "5", source) for p, source in enumerate(["gsm8k", "geo", "gsm8k"])]
    own, other, again = (future.result(timeout=30) for future in futures)
    assert own.scores == again.scores == {"acc": [1.0, -1.0], "step": [1 / 3, 0.0]}
    assert (own.rewards, own.accuracy) == ([2.0, -1.0], [1.0, 0.0])
    assert set(other.scores) == {"geo3k", "geo3k_acc", "geo3k_format"}


def test_512_texts_take_well_under_a_second(pool):
    start = time.monotonic()
    groups = [pool.submit(p, [f"<think>{'so ' * 40}</think> \\boxed{{{p + k}}}" for k in range(8)], [50] * 8, str(p)) for p in range(64)]
    rewards = [future.result(timeout=30).rewards for future in groups]
    seconds = time.monotonic() - start
    assert all(group == [1.0] + [0.1] * 7 for group in rewards)
    # About 0.2 s on an idle core; the bound leaves room for a busy machine.
    assert seconds < 5.0


def test_a_grader_that_is_not_installed_fails_before_training(monkeypatch):
    monkeypatch.setattr(pool_module, "_BOOT", f"import sys; sys.modules['mathruler'] = None; {pool_module._BOOT}")
    with RewardPool(settings()) as pool, pytest.raises(RuntimeError, match="could not start: ModuleNotFoundError: .*mathruler"):
        pool.wait_ready()


def test_a_worker_that_ends_while_starting_is_an_error_of_every_group(monkeypatch):
    monkeypatch.setattr(pool_module, "_BOOT", "import sys; sys.exit(3)")
    with RewardPool(settings()) as pool, pytest.raises(RuntimeError, match="ended while it started .exit code 3."):
        pool.submit(0, [GOOD], [1], "55").result(timeout=30)


def test_reward_processes_import_nothing_heavy():
    code = (
        "import sys; from mindspeed_mm_rl.rewards.worker import self_check; self_check(['geo3k']);"
        "print([name for name in ('torch', 'numpy', 'ray', 'vllm', 'transformers', 'megatron') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert answer.stdout.strip() == "[]"
