"""How good each sample was compared with what could be expected."""

from __future__ import annotations

import torch

from mindspeed_mm_rl.types import Batch, Ragged

_STD_EPSILON = 1e-6


def group_normalised(rewards_PG: torch.Tensor) -> torch.Tensor:
    """(reward - mean) / (std + 1e-6) within each prompt's samples, unbiased std (GRPO, arXiv 2402.03300, section 4.1.2).

    rewards_PG: [prompts, samples of a prompt]; the answer is float64 of the same shape.

    Raises:
        ValueError: fewer than 2 samples: one sample has no spread, its advantage would be 0 / 0.
    """
    if rewards_PG.dim() != 2 or rewards_PG.shape[1] < 2:
        raise ValueError(
            "rl_config.adv_estimator group_norm compares the samples of one prompt, so rl_config.n_samples_per_prompt must be >= 2, "
            f"but rewards came as {list(rewards_PG.shape)} (prompts, samples)"
        )
    rewards_PG = rewards_PG.to(torch.float64)
    # Shifted by the first sample so that equal rewards give exactly 0, whatever the rounding of their mean.
    shifted_PG = rewards_PG - rewards_PG[:, :1]
    centred_PG = shifted_PG - shifted_PG.mean(dim=1, keepdim=True)
    return centred_PG / (centred_PG.square().sum(dim=1, keepdim=True).div(rewards_PG.shape[1] - 1).sqrt() + _STD_EPSILON)


def per_token(values_B: torch.Tensor, lengths: tuple[int, ...]) -> Ragged:
    """Every token of response i gets `values_B[i]`; float32. Example: per_token(tensor([1., 2.]), (2, 1)).values == [1, 1, 2]."""
    if values_B.shape[0] != len(lengths):
        raise ValueError(f"per_token: {values_B.shape[0]} values for {len(lengths)} responses")
    return Ragged(values_B.to(torch.float32).repeat_interleave(torch.tensor(lengths, dtype=torch.int64)), tuple(lengths))


def group_advantages(batch: Batch) -> Ragged:
    """Group-normalised rewards of a batch, one value per response token."""
    if len(batch) % batch.samples_per_prompt:
        raise ValueError(f"{len(batch)} samples are not whole groups of samples_per_prompt {batch.samples_per_prompt}")
    rewards_PG = torch.tensor(batch.rewards, dtype=torch.float64).view(-1, batch.samples_per_prompt)
    return per_token(group_normalised(rewards_PG).flatten(), batch.responses.lengths)
