"""Who writes what at a weight push: every number of every tensor once per node, from the nearest memory, whatever the layout."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from mindspeed_mm_rl.models.placement import Cut
from mindspeed_mm_rl.models.weight_layout import separate_one
from mindspeed_mm_rl.weights.regions import Deal, Region, Transfer, check_whole, deal, messages, regions_of, senders
from tests.spread_weights import SPREADS, Spread, node_choices

CASES = {
    f"{name} on {'/'.join(nodes)}": (spread, nodes)
    for name, spread in SPREADS.items()
    for nodes in {tuple(choice) for choice in node_choices(spread.world)}
}


def held_by(spread: Spread) -> list[list[Region]]:
    return [
        [region for own in spread.pieces(rank) for piece in own for region in regions_of(piece, "float32")] for rank in range(spread.world)
    ]


def writers(dealt: Deal, nodes: Sequence[str]) -> list[tuple[str, int, Region]]:
    """(node, rank whose memory it comes from, region)"""
    own = [(nodes[rank], rank, region) for rank, regions in enumerate(dealt.writes) for region in regions]
    return own + [(nodes[transfer.target], transfer.source, transfer.region) for transfer in dealt.transfers]


@pytest.mark.parametrize("case", CASES)
def test_every_number_is_written_once_on_every_node_and_is_the_right_one(case: str):
    spread, nodes = CASES[case]
    whole = spread.whole(seed=1)
    parts = []
    for rank in range(spread.world):
        tensors = spread.held(rank, whole)
        parts.append(
            {
                region: separate_one(piece.entry, own[piece.name], index).reshape(region.view_shape)
                for own, pieces in zip(tensors, spread.pieces(rank), strict=True)
                for piece in pieces
                for index, region in enumerate(regions_of(piece, "float32"))
            }
        )
    dealt = deal(held_by(spread), nodes)
    counts = {node: {name: torch.zeros_like(tensor) for name, tensor in whole.items()} for node in nodes}
    found = {node: {name: torch.zeros_like(tensor) for name, tensor in whole.items()} for node in nodes}
    for node, rank, region in writers(dealt, nodes):
        region.in_whole(counts[node][region.name]).add_(1)
        region.in_whole(found[node][region.name]).copy_(parts[rank][region])
    for node in nodes:
        assert all(bool((count == 1).all()) for count in counts[node].values())
        assert all(torch.equal(found[node][name], whole[name]) for name in whole)


@pytest.mark.parametrize("case", CASES)
def test_only_what_nobody_on_a_node_holds_is_sent_to_it(case: str):
    spread, nodes = CASES[case]
    held = held_by(spread)
    dealt = deal(held, nodes)
    for rank, regions in enumerate(dealt.writes):
        assert set(regions) <= set(held[rank])
    for transfer in dealt.transfers:
        node = nodes[transfer.target]
        assert transfer.region in held[transfer.source]
        assert not any(transfer.region in held[rank] for rank in range(spread.world) if nodes[rank] == node)


def test_copies_share_the_work():
    """One copy takes the largest tensor, the other one the rest: 100 against 60 + 30 + 30 numbers."""
    regions = [Region(name, None, (size,), "float32") for name, size in (("a", 100), ("b", 60), ("c", 30), ("d", 30))]
    dealt = deal([regions] * 2, ["here"] * 2)
    assert dealt == Deal(((regions[0],), tuple(regions[1:])), ())


def test_two_stages_on_two_nodes_send_each_other_all_they_hold():
    first, second = Region("first", None, (4, 2), "bfloat16"), Region("second", Cut(0, 0, 2), (2, 2), "float32")
    dealt = deal([[first], [second]], ["here", "there"])
    assert dealt == Deal(((first,), (second,)), (Transfer(first, 0, 1), Transfer(second, 1, 0)))
    assert (first.num_bytes, second.num_bytes) == (16, 16)


def test_thirds_are_places_in_each_block():
    """Rows of query, key and value: the second half of each."""
    region = Region("qkv", Cut(0, 1, 2, blocks=3), (3, 2), "float32")
    whole = torch.zeros(6, 2)
    region.in_whole(whole).copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).reshape(region.view_shape))
    assert whole.tolist() == [[0, 0], [1, 2], [0, 0], [3, 4], [0, 0], [5, 6]]


@pytest.mark.parametrize("max_bytes", [1, 64, 100, 1 << 20])
def test_messages_hold_everything_once_and_are_bounded(max_bytes: int):
    regions = [
        Region("matrix", None, (5, 3), "float32"),
        Region("thirds", Cut(0, 0, 4, blocks=3), (12,), "float32"),
        Region("half", Cut(1, 2, 4), (2, 2), "bfloat16"),
    ]
    counts = {region: torch.zeros(region.view_shape) for region in regions}
    for message in messages(regions, max_bytes):
        longest_row = max(piece.num_bytes // (piece.stop - piece.start) for piece in message)
        assert sum(piece.num_bytes for piece in message) <= max(max_bytes, longest_row)
        for piece in message:
            assert piece.of(counts[piece.region]).shape == piece.shape
            piece.of(counts[piece.region]).add_(1)
    assert all(bool((count == 1).all()) for count in counts.values())
    if max_bytes == 1 << 20:
        assert len(list(messages(regions, max_bytes))) == 1


def test_a_tensor_that_is_held_in_part_is_named():
    spread = SPREADS["TP2"]
    held = held_by(spread)
    check_whole([region for regions in held for region in regions], spread.shapes())
    rows = spread.shapes()["lm_head.weight"]
    with pytest.raises(ValueError, match=f"hold {math.prod(rows) // 2} numbers of model.embed_tokens.weight, which has {math.prod(rows)}"):
        check_whole(held[0], spread.shapes())
    with pytest.raises(ValueError, match="config.json has no other"):
        check_whole([Region("other", None, (1,), "float32")], {})


def test_what_not_all_hold_is_sent_once_by_holders_in_turn():
    small, large, other, everywhere = (Region(name, None, (size,), "float32") for name, size in zip("abcd", (4, 8, 2, 1), strict=True))
    both = [everywhere, large, small, other]
    assert senders([both, both, [everywhere]]) == {large: 0, small: 1, other: 1}
