"""The reward pool against real processes: speed, death, endless grading, clean end."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future

import pytest
from test_rewards_verifiers import GOOD, settings

from mindspeed_mm_rl.rewards.pool import RewardPool

ENDLESS = "<think>x</think> \\boxed{9^{9^{9^{9}}}}"
"""math-verify computes this power: in C, where no signal handler of Python is heard."""


@pytest.fixture(scope="module")
def pool():
    with RewardPool(settings(workers=2)) as pool:
        pool.wait_ready()
        yield pool


def pids(pool):
    return [lane.worker.process.pid for lane in pool._lanes]


def test_a_group_comes_back_in_its_order(pool):
    future = pool.submit(3, [GOOD, "\\boxed{55}", "no"], [1, 2, 3], "55", "geo")
    assert isinstance(future, Future)
    group = future.result(timeout=30)
    assert group.rewards == [1.0, 0.9, 0.0]
    assert group.scores == {"geo3k": [1.0, 0.9, 0.0], "acc": [1.0, 1.0, 0.0], "format": [1.0, 0.0, 0.0]}
    assert (group.accuracy, group.timeouts, group.crashes) == ([1.0, 1.0, 0.0], 0, 0)


def test_512_texts_take_well_under_a_second(pool):
    start = time.monotonic()
    groups = [
        pool.submit(p, [f"<think>{'so ' * 40}</think> \\boxed{{{p + k}}}" for k in range(8)], [50] * 8, str(p)) for p in range(64)
    ]
    rewards = [future.result(timeout=30).rewards for future in groups]
    seconds = time.monotonic() - start
    assert all(group == [1.0] + [0.1] * 7 for group in rewards)
    # About 0.2 s on an idle core; the bound leaves room for a busy machine.
    assert seconds < 5.0


def test_a_killed_worker_is_replaced_and_nothing_is_lost(pool):
    before = pids(pool)
    futures = [pool.submit(p, [GOOD] * 8, [1] * 8, "55") for p in range(100)]
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    groups = [future.result(timeout=30) for future in futures]
    assert all(group.rewards == [1.0] * 8 and group.crashes == 0 for group in groups)
    assert not set(before) & set(pids(pool))


def test_endless_grading_is_killed_counted_and_wrong_alone():
    with RewardPool(settings(timeout_seconds=1.0)) as pool:
        pool.wait_ready()
        start = time.monotonic()
        group = pool.submit(0, [GOOD, ENDLESS, GOOD], [1, 1, 1], "55").result(timeout=30)
        assert 1.0 <= time.monotonic() - start < 10.0
        assert (group.rewards, group.timeouts) == ([1.0, 0.0, 1.0], 1)
        assert pool.submit(1, [GOOD], [1], "55").result(timeout=30).rewards == [1.0]


def test_close_leaves_no_process_even_of_an_endless_grading():
    pool = RewardPool(settings(timeout_seconds=60.0))
    pool.wait_ready()
    running = pool.submit(0, [ENDLESS], [1], "55")
    waiting = pool.submit(1, [GOOD], [1], "55")
    time.sleep(0.2)
    (pid,) = pids(pool)
    pool.close()
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(RuntimeError, match="closed while it was grading"):
        running.result(timeout=5)
    assert waiting.cancelled()
    with pytest.raises(RuntimeError, match="closed; prompt 2"):
        pool.submit(2, [GOOD], [1], "55")


def test_a_verifier_that_raises_names_its_sample_and_spares_the_pool():
    with RewardPool(settings(verifiers=("acc_for_dapo",))) as pool:
        failed = pool.submit(7, ["no line", "Answer: 5"], [1, 1], None, "gsm8k")
        with pytest.raises(RuntimeError, match="acc_for_dapo.* failed on sample 1 of prompt 7 of 'gsm8k' .answer None.*"):
            failed.result(timeout=30)
        (pid,) = pids(pool)
        assert pool.submit(8, ["Answer: 5"], [1], "5").result(timeout=30).rewards == [1.0]
        assert pids(pool) == [pid]


def test_a_worker_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "site-packages" not in path and not path.startswith("/tmp")])
    monkeypatch.setattr(sys, "flags", sys.flags)
    monkeypatch.setattr("mindspeed_mm_rl.rewards.pool._BOOT", "import sys; sys.exit(3)")
    with RewardPool(settings()) as pool, pytest.raises(RuntimeError, match="ended while it started .exit code 3."):
        pool.wait_ready()


def test_reward_processes_import_nothing_heavy():
    code = (
        "import sys; from mindspeed_mm_rl.rewards.worker import self_check; self_check(['geo3k']);"
        "print([name for name in ('torch', 'numpy', 'ray', 'vllm', 'transformers', 'megatron') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
    assert answer.stdout.strip() == "[]"
