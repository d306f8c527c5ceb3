"""Tokens dealt to context-parallel ranks, all ranks played by one process: together they attend as one."""

from __future__ import annotations

import pytest
import torch

from mindspeed_mm_rl.platforms.packed_sdpa import Segments, packed_sdpa

LENGTHS = (5, 1, 17, 9, 8)
CPU = torch.device("cpu")


def shares(ranks: int, algorithm: str) -> list:
    from mindspeed_mm_rl.models.context_parallel import context_share

    return [context_share(LENGTHS, ranks, rank, algorithm, CPU) for rank in range(ranks)]


@pytest.mark.parametrize("algorithm", ["ulysses", "all_gather"])
@pytest.mark.parametrize("ranks", [2, 4, 5])
def test_every_token_has_one_rank(one_rank, ranks: int, algorithm: str):
    dealt = shares(ranks, algorithm)
    order = torch.cat([share.own for share in dealt])
    assert sorted(order.tolist()) == list(range(40))
    assert torch.equal(order[dealt[0].place], torch.arange(40))
    assert {len(share.own) for share in dealt} == {40 // ranks}


def test_slices_of_two_ranks_by_hand(one_rank):
    first, second = shares(2, "all_gather")
    assert first.own.tolist() == [*range(0, 10), *range(30, 40)]
    # 0-9: sequences 5, 1 and the first 4 of 17; 30-39: the last 2 of 9, which see all 9 keys, and 8.
    assert first.segments.queries == (5, 1, 4, 2, 8) and first.segments.keys == (5, 1, 4, 9, 8)
    assert first.key_rows.tolist() == [*range(0, 10), *range(23, 32), *range(32, 40)]
    assert second.segments.queries == (10, 3, 7) and second.segments.keys == (14, 17, 7)


@pytest.mark.parametrize("ranks", [2, 4, 5])
def test_ranks_that_collect_keys_attend_as_one(one_rank, ranks: int):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(40, heads, 32, generator=generator) for heads in (4, 2, 2))
    expected = packed_sdpa(query, key, value, Segments.of(LENGTHS, LENGTHS, CPU), True, 0.2)
    for share in shares(ranks, "all_gather"):
        got = packed_sdpa(query[share.own], key[share.key_rows], value[share.key_rows], share.segments, True, 0.2)
        torch.testing.assert_close(got, expected[share.own], atol=2e-6, rtol=0)


def test_long_sequences_are_shared_evenly(one_rank):
    from mindspeed_mm_rl.models.context_parallel import context_share

    def work(rank: int) -> int:
        segments = context_share((4096,), 4, rank, "all_gather", CPU).segments
        return sum(queries * keys - queries * (queries - 1) // 2 for queries, keys in zip(segments.queries, segments.keys, strict=True))

    assert len({work(rank) for rank in range(4)}) == 1
