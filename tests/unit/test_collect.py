"""What is accepted for training: whole groups in prompt order, and no endless search for them."""

from __future__ import annotations

from functools import partial

import pytest

from mindspeed_mm_rl.algorithms.filters import has_spread
from mindspeed_mm_rl.trainer.collect import Collected
from mindspeed_mm_rl.types import Group, Prompt, Rollout
from tests.plans import recipe_plan

DIFFERS = partial(has_spread, metric="acc")


def group(prompt_id: int, *scores: float) -> Group:
    rollouts = tuple(Rollout(prompt_id * 2 + k, [5], [-1.0], "stop", 0) for k in range(2))
    return Group(Prompt(prompt_id, [1], 1, (), answer=""), rollouts, {"acc": list(scores)}, list(scores), list(scores))


def test_groups_are_taken_in_prompt_order_and_surplus_is_counted() -> None:
    collected = Collected()
    collected.add([group(0, 0, 1), group(1, 1, 1), group(2, 1, 0), group(3, 0, 0)], DIFFERS)
    collected.add([group(4, 0, 1), group(5, 1, 1), group(6, 1, 0)], DIFFERS)
    collected.trim(3)
    assert [g.prompt.prompt_id for g in collected.groups] == [0, 2, 4]
    assert (collected.num_gen_batches, collected.num_filtered, collected.num_surplus) == (2, 3, 1)
    assert [g.prompt.prompt_id for g in collected.generated] == list(range(7))


def test_without_a_filter_every_group_is_trained_on() -> None:
    collected = Collected()
    collected.add([group(0, 1, 1), group(1, 0, 0)], None)
    assert len(collected.groups) == 2 and collected.num_filtered == 0


def test_the_limit_of_generation_batches_is_an_error_with_both_numbers() -> None:
    collected, plan = Collected(), recipe_plan(filter_groups=True, train_prompts=3, filter_max_batches=2)
    for first in (0, 2):
        collected.check_may_go_on(plan)
        collected.add([group(first, 0, 1), group(first + 1, 1, 1)], DIFFERS)
    with pytest.raises(ValueError, match=r"filter_groups_max_batches \(2\).*gave 2 groups.*asks for 3"):
        collected.check_may_go_on(plan)


def test_a_metric_that_never_differs_does_not_sample_for_ever() -> None:
    collected, plan = Collected(), recipe_plan(filter_groups=True, train_prompts=3, filter_max_batches=-1)
    for batch in range(10):
        collected.check_may_go_on(plan)
        collected.add([group(2 * batch, -1.0, -1.0), group(2 * batch + 1, -1.0, -1.0)], DIFFERS)
    with pytest.raises(ValueError, match=r"10 generation batches \(20 groups\) gave no group .* 'score'.*\{'acc': \[-1.0, -1.0\]\}"):
        collected.check_may_go_on(plan)
