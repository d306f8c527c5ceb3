"""Weights that are spread over processes reach readers on every node whole, in real processes and on pretended nodes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parallel.push_ranks import PUSHES, run
from tests.rank_pool import RankPool
from tests.spread_weights import SPREADS, node_choices

CASES = {
    f"{name} on {'/'.join(nodes)}": (name, nodes)
    for name in ("one process", "TP2xPP2, tied", "PP2+VPP2, tied", "TP2xEP2", "DP4")
    for nodes in {tuple(choice) for choice in node_choices(SPREADS[name].world)}
}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(seconds=60.0) as pool:
        yield pool


@pytest.mark.parametrize("case", CASES)
def test_readers_of_every_node_find_the_whole_model(pool: RankPool, case: str):
    name, nodes = CASES[case]
    answers = pool.run(SPREADS[name].world, run, name, nodes)
    assert answers == [[True] * PUSHES] * SPREADS[name].world
