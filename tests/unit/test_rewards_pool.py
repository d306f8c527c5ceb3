"""The reward pool against real processes: speed, death, endless grading, clean end."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future

import pytest

from mindspeed_mm_rl.rewards import pool as pool_module
from mindspeed_mm_rl.rewards.pool import RewardPool
from mindspeed_mm_rl.rewards.scoring import RewardSettings

GOOD = "<think>Angles add up to 180.</think> So \\boxed{55}"
ENDLESS = "<think>x</think> \\boxed{9^{9^{9^{9}}}}"
"""math-verify computes this power: in C, where no signal handler of Python is heard."""


def settings(verifiers=("geo3k",), workers=1, timeout_seconds=20.0):
    return RewardSettings(verifiers, (1.0,), 0, 1.0, 2048, workers, timeout_seconds)


@pytest.fixture(scope="module")
def pool():
    with RewardPool(settings(workers=2)) as pool:
        pool.wait_ready()
        yield pool


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as status:
            return status.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


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
    groups = [pool.submit(p, [f"<think>{'so ' * 40}</think> \\boxed{{{p + k}}}" for k in range(8)], [50] * 8, str(p)) for p in range(64)]
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
    # Whoever has not noticed by now does so here.
    futures += [pool.submit(p, [GOOD] * 8, [1] * 8, "55") for p in range(100, 200)]
    groups = [future.result(timeout=60) for future in futures]
    assert all(group.rewards == [1.0] * 8 and group.crashes == 0 for group in groups)
    assert not set(before) & set(pids(pool))


def test_a_grader_ends_with_its_keeper():
    with RewardPool(settings(timeout_seconds=60.0)) as pool:
        pool.wait_ready()
        worker = pool._lanes[0].worker
        grader = worker._grader
        pool.submit(0, [ENDLESS], [1], "55")
        time.sleep(0.2)
        os.kill(worker.process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 20.0
        while is_running(grader):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_endless_grading_is_killed_counted_and_wrong_alone():
    with RewardPool(settings(timeout_seconds=1.0)) as pool:
        pool.wait_ready()
        start = time.monotonic()
        group = pool.submit(0, [GOOD, ENDLESS, GOOD], [1, 1, 1], "55").result(timeout=30)
        assert 1.0 <= time.monotonic() - start < 10.0
        assert (group.rewards, group.timeouts) == ([1.0, 0.0, 1.0], 1)
        assert pool.submit(1, [GOOD], [1], "55").result(timeout=30).rewards == [1.0]


def test_a_response_that_kills_every_worker_is_wrong_alone(monkeypatch):
    deadly = (
        "import os; from mindspeed_mm_rl.rewards import worker; grade = worker.score_sample;"
        "worker.score_sample = lambda text, *rest: os.abort() if text == 'deadly' else grade(text, *rest)"
    )
    boot, main = pool_module._BOOT.rsplit("; ", 1)
    monkeypatch.setattr(pool_module, "_BOOT", f"{boot}; {deadly}; {main}")
    with RewardPool(settings()) as pool:
        group = pool.submit(0, [GOOD, "deadly", GOOD], [1, 1, 1], "55").result(timeout=60)
    assert (group.rewards, group.crashes, group.timeouts) == ([1.0, 0.0, 1.0], 1, 0)


def test_close_leaves_no_process_even_of_an_endless_grading():
    pool = RewardPool(settings(timeout_seconds=60.0))
    pool.wait_ready()
    running = pool.submit(0, [ENDLESS], [1], "55")
    waiting = pool.submit(1, [GOOD], [1], "55")
    time.sleep(0.2)
    worker = pool._lanes[0].worker
    pool.close()
    pool.close()
    for pid in (worker.process.pid, worker._grader):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with pytest.raises(RuntimeError, match="closed while it was grading"):
        running.result(timeout=5)
    assert waiting.cancelled()
    with pytest.raises(RuntimeError, match="closed; prompt 2"):
        pool.submit(2, [GOOD], [1], "55")


def test_not_even_an_endless_grading_outlives_a_killed_driver():
    code = (
        "import sys; from mindspeed_mm_rl.rewards.pool import RewardPool; from mindspeed_mm_rl.rewards.scoring import RewardSettings;"
        "pool = RewardPool(RewardSettings(('geo3k',), (1.0,), 0, 1.0, 2048, 2, 0.5)); pool.wait_ready();"
        f"pool._lanes[0].worker.grade([{ENDLESS!r}], '55');"
        "print(*[pid for lane in pool._lanes for pid in (lane.worker.process.pid, lane.worker._grader)], flush=True); sys.stdin.read()"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), text=True)
    workers = [int(pid) for pid in driver.stdout.readline().split()]
    driver.kill()
    driver.communicate()
    deadline = time.monotonic() + 20.0
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


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
