"""Groups become columns, columns become mini-batches; every row keeps its sample id."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mindspeed_mm_rl.trainer.batch import mini_batches, to_batch
from mindspeed_mm_rl.types import Batch, Group, ImageInput, Prompt, Rollout

IMAGE_TOKEN = 9
ARCHITECTURE = SimpleNamespace(image_token_id=IMAGE_TOKEN, vision=SimpleNamespace(merge_size=2))


def group(prompt_id: int, expanded_length: int = 6) -> Group:
    image = ImageInput("k", np.zeros((56, 56, 3), np.uint8), (1, 4, 4))
    prompt = Prompt(prompt_id, [5, IMAGE_TOKEN, 6], expanded_length, (image,), answer="1")
    rollouts = tuple(Rollout(prompt_id * 2 + k, [7] * (k + 1), [-0.5] * (k + 1), "stop", 0) for k in range(2))
    return Group(prompt, rollouts, {"acc": [1.0, 0.0]}, [1.0, 0.0], [1.0, 0.0])


def test_image_tokens_are_expanded_and_rows_keep_their_ids() -> None:
    batch = to_batch([group(3), group(5)], ARCHITECTURE)
    assert batch.sample_ids == (6, 7, 10, 11)
    assert batch.prompts.rows()[0].tolist() == [5, 9, 9, 9, 9, 6]
    assert batch.responses.lengths == (1, 2, 1, 2)
    assert batch.image_keys == (("k",),) * 4
    assert batch.rewards == (1.0, 0.0, 1.0, 0.0)


def test_a_prompt_whose_image_tokens_do_not_add_up_is_named() -> None:
    with pytest.raises(ValueError, match="prompt 3: 4 image tokens and 6 tokens in all.*give 4 and 7"):
        to_batch([group(3, expanded_length=7)], ARCHITECTURE)


def test_select_takes_the_same_rows_of_every_column() -> None:
    batch = to_batch([group(3), group(5)], ARCHITECTURE)
    batch = batch.with_column(
        "old_logprobs", {i: torch.full((n,), float(i)) for i, n in zip(batch.sample_ids, batch.responses.lengths, strict=True)}
    )
    chosen = batch.select([3, 0])
    assert chosen.sample_ids == (11, 6)
    assert chosen.old_logprobs.values.tolist() == [11.0, 11.0, 6.0]


def test_a_missing_sample_is_an_error_and_not_a_shift() -> None:
    batch = to_batch([group(3)], ARCHITECTURE)
    with pytest.raises(KeyError):
        batch.with_column("old_logprobs", {6: torch.zeros(1)})


def mini_ids(batch: Batch, **run: object) -> list[tuple[int, ...]]:
    settings = {"epochs": 1, "shuffle_mini_batch": False, "mini_batch_prompts": 2, "seed": 1} | run
    return [mini.sample_ids for mini in mini_batches(batch, SimpleNamespace(**settings), step=4)]


def test_mini_batches_are_whole_groups_and_the_last_may_be_smaller() -> None:
    batch = to_batch([group(i) for i in range(3)], ARCHITECTURE)
    assert mini_ids(batch) == [(0, 1, 2, 3), (4, 5)]


def test_shuffled_mini_batches_hold_every_group_once_per_epoch_and_repeat_exactly() -> None:
    batch = to_batch([group(i) for i in range(4)], ARCHITECTURE)
    first, again = (mini_ids(batch, epochs=2, shuffle_mini_batch=True) for _ in range(2))
    assert first == again
    assert sorted(i for ids in first[:2] for i in ids) == list(range(8))
    assert sorted(i for ids in first[2:] for i in ids) == list(range(8))
