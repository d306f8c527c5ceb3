"""What readers get in memory of their device is what the host carrier has, bit for bit, a few tensors at a time, whoever dies meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parallel.device_push_ranks import run
from tests.rank_pool import RankPool
from tests.spread_weights import SPREADS, WIDE

MIB = 1 << 20
CHUNK_BYTES, MESSAGE_BYTES = 1000, 200
"""The largest tensors of the small models have 640 and 768 bytes."""
LAYOUTS = {"one process": (0,), "TP2xPP2, tied": (0, 3), "PP2+VPP2, tied": (0, 1), "TP2xEP2": (1, 2)}
"""With the ranks that have a reader."""


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(seconds=60.0) as pool:
        yield pool


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_brings_the_bits_of_the_host_carrier_in_small_chunks(pool: RankPool, name: str):
    world, readers = SPREADS[name].world, LAYOUTS[name]
    answers = pool.run(world + len(readers), run, name, readers, CHUNK_BYTES, MESSAGE_BYTES)
    expected, _ = answers[0]
    assert expected[0].keys() == SPREADS[name].shapes().keys() and expected[0] != expected[1]
    for found, largest in answers[world:]:
        assert found == expected
        assert CHUNK_BYTES // 2 < largest <= CHUNK_BYTES


def test_a_push_takes_the_memory_of_a_chunk_and_not_of_the_model(pool: RankPool):
    chunk = 4 * MIB
    answers = pool.run(3, run, WIDE, (0,), chunk, MIB)
    assert sum(tensor.nbytes for tensor in WIDE.whole(0).values()) > 16 * chunk
    assert max(grown for _, grown in answers[:2]) < 3 * chunk
    assert answers[2] == [answers[0][0], 4 * MIB]


def test_who_reads_no_more_holds_up_nobody_and_the_next_push_finds_all(pool: RankPool):
    """The reader of rank 0 dies at its first chunk."""
    world = SPREADS["TP2"].world
    with pytest.raises(RuntimeError) as failure:
        pool.run(world + 2, run, "TP2", (-1, 1), CHUNK_BYTES, MESSAGE_BYTES)
    assert str(failure.value).splitlines() == [f"rank {world} of {world + 2}: the process died"]
