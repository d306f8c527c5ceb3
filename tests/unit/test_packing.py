"""Which samples share a forward pass, and which rank gets them."""

from __future__ import annotations

from mindspeed_mm_rl.data.packing import balanced_shares, micro_batches


def test_micro_batches_fill_up_to_the_token_budget_in_order() -> None:
    assert micro_batches([3, 3, 5, 2], max_tokens=6) == [[0, 1], [2], [3]]
    assert micro_batches([3, 3, 5, 1], max_tokens=6) == [[0, 1], [2, 3]]


def test_a_sample_over_the_budget_gets_a_micro_batch_of_its_own() -> None:
    assert micro_batches([2, 9, 2], max_tokens=6) == [[0], [1], [2]]


def test_micro_batches_are_bounded_by_samples_too() -> None:
    assert micro_batches([1, 1, 1, 1, 1], max_tokens=100, max_samples=2) == [[0, 1], [2, 3], [4]]


def test_no_samples_give_no_micro_batch() -> None:
    assert micro_batches([], max_tokens=6) == []


def test_shares_are_balanced_by_weight_and_hold_every_item_once() -> None:
    assert balanced_shares([9, 1, 5, 5], ranks=2) == [[0, 1], [2, 3]]
    shares = balanced_shares([4, 4, 4, 4, 4], ranks=3)
    assert sorted(item for share in shares for item in share) == [0, 1, 2, 3, 4]
    assert max(map(len, shares)) - min(map(len, shares)) == 1
