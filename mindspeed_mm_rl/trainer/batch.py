"""Groups, or pairs, -> the columns of a batch, and a batch -> its mini-batches."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch

from mindspeed_mm_rl.config.plan import RunPlan
from mindspeed_mm_rl.data.images import expand_image_tokens
from mindspeed_mm_rl.data.pairs import Pair
from mindspeed_mm_rl.models.families import Architecture
from mindspeed_mm_rl.types import Batch, Group, Ragged


def to_batch(groups: list[Group], architecture: Architecture) -> Batch:
    """Raises ValueError, naming the prompt, when its image tokens are not what its pictures give."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    prompts = [tokens for group in groups for tokens in [_expanded(group, architecture)] * len(group.rollouts)]
    responses = Ragged.from_rows([rollout.token_ids for rollout in rollouts], torch.int64)
    return Batch(
        sample_ids=tuple(rollout.sample_id for rollout in rollouts),
        prompts=Ragged.from_rows(prompts, torch.int64),
        responses=responses,
        loss_mask=Ragged(torch.ones(len(responses.values)), responses.lengths),
        rollout_logprobs=Ragged.from_rows([rollout.logprobs for rollout in rollouts], torch.float32),
        image_keys=tuple(tuple(image.key for image in group.prompt.images) for group in groups for _ in group.rollouts),
        rewards=tuple(reward for group in groups for reward in group.rewards),
        samples_per_prompt=len(groups[0].rollouts),
    )


def batch_of_pairs(pairs: Sequence[Pair]) -> Batch:
    """Two samples for each pair, the chosen response first."""
    responses = Ragged.from_rows([torch.tensor(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)], torch.int64)
    # Columns that only sampled responses have.
    nothing = Ragged(torch.zeros(len(responses.values)), responses.lengths)
    return Batch(
        sample_ids=tuple(2 * pair.pair_id + k for pair in pairs for k in range(2)),
        prompts=Ragged.from_rows([ids for pair in pairs for ids in [torch.tensor(pair.prompt_ids)] * 2], torch.int64),
        responses=responses,
        loss_mask=Ragged(torch.ones(len(responses.values)), responses.lengths),
        rollout_logprobs=nothing,
        image_keys=tuple(tuple(image.key for image in pair.images) for pair in pairs for _ in range(2)),
        rewards=(1.0, 0.0) * len(pairs),
        samples_per_prompt=2,
        advantages=nothing,
    )


def _expanded(group: Group, architecture: Architecture) -> torch.Tensor:
    prompt = group.prompt
    if not prompt.images:
        return torch.tensor(prompt.token_ids)
    merge = architecture.vision.merge_size
    grids = [image.grid_thw for image in prompt.images]
    tokens = torch.tensor(expand_image_tokens(prompt.token_ids, grids, architecture.image_token_id, merge))
    found, expected = int((tokens == architecture.image_token_id).sum()), sum(image.num_tokens(merge) for image in prompt.images)
    if found != expected or len(tokens) != prompt.expanded_length:
        raise ValueError(
            f"prompt {prompt.prompt_id}: {found} image tokens and {len(tokens)} tokens in all, "
            f"but its {len(prompt.images)} picture(s) give {expected} and {prompt.expanded_length}"
        )
    return tokens


def mini_batches(batch: Batch, run: RunPlan, step: int) -> Iterator[Batch]:
    """Whole groups, run.mini_batch_prompts of them at a time (the last may be smaller), once per epoch.

    Shuffling, where asked for, depends on (seed, step, epoch) alone, so that a resumed run cuts the same mini-batches.
    """
    n = batch.samples_per_prompt
    for epoch in range(run.epochs):
        groups = list(range(len(batch) // n))
        if run.shuffle_mini_batch:
            random.Random(f"{run.seed}/{step}/{epoch}").shuffle(groups)
        for start in range(0, len(groups), run.mini_batch_prompts):
            chosen = sorted(groups[start : start + run.mini_batch_prompts])
            yield batch.select([group * n + k for group in chosen for k in range(n)])
