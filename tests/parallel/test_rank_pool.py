"""What a parallel test rests on: a rank that fails or hangs is named, and the next job has sound processes."""

from __future__ import annotations

import os
import subprocess
import time

import psutil
import pytest

from tests.rank_pool import RankPool


def number(rank: int, world: int, address: str) -> tuple[int, int, str, int]:
    return rank, world, address, os.getpid()


def one_fails(rank: int, world: int, address: str) -> None:
    if rank == 1:
        raise ValueError("this one")
    time.sleep(600)


def one_dies(rank: int, world: int, address: str) -> None:
    if rank == 0:
        os._exit(3)


def one_hangs(rank: int, world: int, address: str) -> int:
    time.sleep(600 * rank)
    return rank


def test_ranks_answer_in_their_order_and_are_used_again() -> None:
    with RankPool(seconds=60.0) as pool:
        first, second = pool.run(2, number), pool.run(1, number)
        assert [answer[:2] for answer in first] == [(0, 2), (1, 2)] and second[0][:2] == (0, 1)
        assert len({answer[2] for answer in first}) == 1
        assert second[0][3] == first[0][3] != first[1][3]


@pytest.mark.parametrize(
    ("job", "seconds", "told"),
    [
        (one_fails, 60.0, "rank 1 of 2: Traceback.*ValueError: this one.*without an answer: \\[0\\]"),
        (one_dies, 60.0, "rank 0 of 2: the process died"),
        (one_hangs, 3.0, "ranks without an answer: \\[1\\]"),
    ],
)
def test_a_rank_that_fails_is_named_and_replaced(job, seconds: float, told: str) -> None:
    with RankPool(60.0) as pool:
        # Processes that have started: a slow machine takes longer for that than the job may.
        pool.run(2, number)
        pool.seconds = seconds
        with pytest.raises(RuntimeError, match=f"(?s){told}"):
            pool.run(2, job)
        pool.seconds = 60.0
        assert [answer[0] for answer in pool.run(2, number)] == [0, 1]


def starts_another(rank: int, world: int, address: str) -> int:
    return subprocess.Popen(["sleep", "600"]).pid


def test_what_a_rank_has_started_ends_with_it() -> None:
    with RankPool(seconds=60.0) as pool:
        (pid,) = pool.run(1, starts_another)
    end = time.monotonic() + 30
    while _runs(pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
