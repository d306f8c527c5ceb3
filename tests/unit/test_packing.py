"""Which samples share a forward pass, and which rank gets them."""

from __future__ import annotations

import random

import pytest

from mindspeed_mm_rl.data.packing import balanced_rows, balanced_shares, micro_batches


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


def test_samples_of_a_prompt_stay_together_and_every_row_has_one_rank() -> None:
    assert balanced_rows([3, 2, 9, 9, 2, 2], together=2, ranks=2) == [[2, 3], [0, 1, 4, 5]]
    assert balanced_rows([5, 5], together=2, ranks=2) == [[0, 1], []]


@pytest.mark.parametrize(("prompts", "ranks", "in_order"), [(32, 4, 1.33), (64, 8, 1.54), (512, 64, 1.97)])
def test_the_heaviest_rank_has_at_most_two_percent_more_tokens_than_the_mean(prompts: int, ranks: int, in_order: float) -> None:
    """Eight samples of a prompt, long ones for hard prompts. in_order: what the heaviest rank would have of the mean without balance."""
    random.seed(prompts)
    means = [random.expovariate(1 / 500) for _ in range(prompts)]
    lengths = [int(min(2048, 50 + mean * random.uniform(0.5, 1.5))) for mean in means for _ in range(8)]
    shares = balanced_rows(lengths, together=8, ranks=ranks)
    assert sorted(row for share in shares for row in share) == list(range(len(lengths)))
    mean, size = sum(lengths) / ranks, len(lengths) // ranks
    assert max(sum(lengths[row] for row in share) for share in shares) / mean <= 1.02
    assert max(sum(lengths[start : start + size]) for start in range(0, len(lengths), size)) / mean == pytest.approx(in_order, abs=0.01)


def test_a_prompt_goes_with_its_weight_whatever_the_order_of_the_batch() -> None:
    """What a sample meets does not depend on when its group was finished: rows are taken by prompt, and answers come back by sample id."""
    weights = [700, 30, 410, 55, 620, 300, 90, 515]
    shares = {frozenset(weights[i] for i in share) for share in balanced_shares(weights, 3)}
    turned = weights[::-1]
    assert {frozenset(turned[i] for i in share) for share in balanced_shares(turned, 3)} == shares
