"""The processes that grade, killed and hung: nothing is lost, nothing is left behind, and no answer costs more than its bound."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mindspeed_mm_rl.config.schema import RLConfig
from mindspeed_mm_rl.rewards.pool import RewardPool
from mindspeed_mm_rl.rewards.scoring import RewardSettings

GOOD = "<think>Angles add up to 180.</think> So \\boxed{55}"
ENDLESS = "<think>x</think> \\boxed{9^{9^{9^{9}}}}"
"""math-verify computes this power: in C, where no signal handler of Python is heard."""


def settings(workers=1, timeout_seconds=20.0, verifiers=("geo3k",)):
    return RewardSettings(verifiers, (1.0,) * len(verifiers), 0, 1.0, 2048, workers, timeout_seconds)


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
    return [lane.worker.keeper.process.pid for lane in pool._lanes]


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
        os.kill(worker.keeper.process.pid, signal.SIGKILL)
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


def test_close_leaves_no_process_even_of_an_endless_grading():
    pool = RewardPool(settings(timeout_seconds=60.0))
    pool.wait_ready()
    running = pool.submit(0, [ENDLESS], [1], "55")
    waiting = pool.submit(1, [GOOD], [1], "55")
    while not running.running():
        time.sleep(0.01)
    time.sleep(0.2)
    worker = pool._lanes[0].worker
    pool.close()
    pool.close()
    for pid in (worker.keeper.process.pid, worker._grader):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with pytest.raises(RuntimeError, match="closed while it was grading"):
        running.result(timeout=5)
    assert waiting.cancelled()
    with pytest.raises(RuntimeError, match="closed; prompt 2"):
        pool.submit(2, [GOOD], [1], "55")


def test_not_even_an_endless_grading_outlives_a_killed_driver():
    code = f"""
import sys
from mindspeed_mm_rl.rewards.pool import RewardPool
from mindspeed_mm_rl.rewards.scoring import Question, RewardSettings
pool = RewardPool(RewardSettings(("geo3k",), (1.0,), 0, 1.0, 2048, 2, 0.5))
pool.wait_ready()
workers = [lane.worker for lane in pool._lanes]
workers[0].grade([{ENDLESS!r}], Question("55"), ["geo3k"])
print(*[pid for worker in workers for pid in (worker.keeper.process.pid, worker._grader)], flush=True)
sys.stdin.read()
"""
    driver = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), text=True)
    workers = [int(pid) for pid in driver.stdout.readline().split()]
    driver.kill()
    driver.communicate()
    deadline = time.monotonic() + 20.0
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def boxed(answer):
    return f"<think>a</think><answer>\\boxed{{{answer}}}</answer>"


CODE = "open({flag!r},'w')", "__import__('os').system('touch {flag}')", "(lambda: exec('open({flag!r},chr(119))'))()"
HOSTILE = {
    "power tower": boxed("9^9^9^9"),
    "power tower in braces": boxed("9^{9^{9^{9}}}"),
    "nested braces": boxed("{" * 5000 + "}" * 5000),
    "open braces": "\\boxed" + "{" * 5000,
    "digits": boxed("9" * 200_000),
    "digits without a box": "7" * 200_000,
    "exponent": boxed("10^{999999999}"),
    "float exponent": boxed("1e999999999"),
    "factorial": boxed("(10^9)!"),
    "factorials": boxed("9!!!!!!"),
    "binomial": boxed("\\binom{10^9}{5\\cdot 10^8}"),
    "fractions": boxed("\\frac{1}{" * 30 + "x" + "}" * 30),
    "short fractions": boxed("\\frac1" * 50),
    "roots": boxed("\\sqrt{" * 40 + "2" + "}" * 40),
    "parentheses": boxed("(" * 140 + ")" * 140),
    "boxes": "\\boxed{" * 20_000,
    "closed boxes": "\\boxed{5}" * 20_000,
    "thoughts": "<think>" * 20_000 + "</think>" * 20_000,
    "answers": "<think></think>" + "</think><answer>" * 20_000,
    "answer lines": "Answer:" * 40_000,
    "dollars": "Answer: " + "$" * 290,
    "blanks": boxed(" " * 100_000 + "5"),
    "blanks between tags": "<think></think>" + " " * 100_000 + "<answer>" + "</answer>x" * 1000,
    "emoji": boxed("\U0001f4a3" * 280),
    "accents": boxed("e" + "\u0301" * 280),
    "surrogates": boxed("\ud800" * 100),
    "zeros": boxed("\0" * 250),
    "right to left": boxed("\u202e5"),
    "sum": boxed("\\sum_{i=1}^{10^{12}} i^{i}"),
    "integral": boxed("\\int_0^{\\infty} e^{-x^2}\\sin(x^{x}) dx"),
    "polynomial": boxed("(x+y+z)^{200}"),
    "product": boxed("\\prod_{n=1}^{999999} (x+n)"),
    "matrix": boxed("\\begin{pmatrix}" + "&".join("1" * 120) + "\\end{pmatrix}"),
    "minus": boxed("-" * 289 + "5"),
    "backslashes": boxed("\\" * 290),
    "logarithm": boxed("\\log(\\log(10^{10^{10}}))"),
    "steps": "\nStep 1:" * 50_000,
}


def test_hostile_answers_cost_at_most_ten_seconds_each_and_never_the_run(tmp_path):
    """All verifiers at once; what an answer costs over its bound, a second here, it costs over the bound that a run has."""
    verifiers = ("geo3k", "acc", "math_verify_reward", "base_acc", "acc_for_dapo", "strict_format", "format", "step", "retool_reward")
    flag, bound, seconds = tmp_path / "ran", 1.0, []
    texts = [*HOSTILE.values(), *(boxed(code.format(flag=str(flag))) for code in CODE)]
    with RewardPool(settings(1, bound, verifiers)) as pool:
        pool.wait_ready()
        for index, text in enumerate(texts):
            start = time.monotonic()
            group = pool.submit(index, [text], [1], "6").result(timeout=60)
            seconds.append(time.monotonic() - start)
            assert group.accuracy == [0.0], text[:80]
        assert RLConfig().verifier_timeout + max(seconds) - bound <= 10.0
        assert pool.submit(99, [GOOD], [1], "55").result(timeout=30).scores["geo3k"] == [1.0]
    assert not flag.exists()
