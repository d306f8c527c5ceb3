"""What a parallel test rests on: a rank that fails or hangs is named, and the next job has sound processes."""

from __future__ import annotations

import os
import time

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
    with RankPool(seconds) as pool:
        with pytest.raises(RuntimeError, match=f"(?s){told}"):
            pool.run(2, job)
        assert [answer[0] for answer in pool.run(2, number)] == [0, 1]
