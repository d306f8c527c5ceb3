"""How good each sample, or each of its tokens, was compared with what could be expected."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from mindspeed_mm_rl.types import Batch, Ragged

_STD_EPSILON = 1e-6
_VARIANCE_EPSILON = 1e-8
_ROWS_AT_A_TIME = 1024
"""Bounds the padded tensors of one pass of GAE: 160 MB each at 20,000 tokens."""

GroupEstimate = Callable[[torch.Tensor], torch.Tensor]
"""rewards [prompts, samples of a prompt] -> advantages of the same shape, float64."""


def group_centred(rewards_PG: torch.Tensor) -> torch.Tensor:
    """reward - mean within each prompt's samples (Dr. GRPO, arXiv 2503.20783, section 3.2: without the bias of dividing by the std).

    rewards_PG: [prompts, samples of a prompt]; the answer is float64 of the same shape.

    Raises:
        ValueError: fewer than 2 samples: a sample can't be compared with itself.
    """
    if rewards_PG.dim() != 2 or rewards_PG.shape[1] < 2:
        raise ValueError(
            "this algorithm compares the samples of one prompt (rl_config.adv_estimator group_norm and its relatives), so "
            f"rl_config.n_samples_per_prompt must be >= 2, but rewards came as {list(rewards_PG.shape)} (prompts, samples)"
        )
    rewards_PG = rewards_PG.to(torch.float64)
    # Shifted by the first sample so that equal rewards give exactly 0, whatever the rounding of their mean.
    shifted_PG = rewards_PG - rewards_PG[:, :1]
    return shifted_PG - shifted_PG.mean(dim=1, keepdim=True)


def group_normalised(rewards_PG: torch.Tensor) -> torch.Tensor:
    """(reward - mean) / (std + 1e-6) within each prompt's samples, unbiased std (GRPO, arXiv 2402.03300, section 4.1.2)."""
    centred_PG = group_centred(rewards_PG)
    return centred_PG / (centred_PG.square().sum(dim=1, keepdim=True).div(rewards_PG.shape[1] - 1).sqrt() + _STD_EPSILON)


def leave_one_out(rewards_PG: torch.Tensor) -> torch.Tensor:
    """reward - mean of the prompt's other samples (RLOO, arXiv 2402.14740): (reward - mean) * n / (n - 1), an unbiased baseline."""
    samples = rewards_PG.shape[-1]
    return group_centred(rewards_PG) * (samples / max(samples - 1, 1))


def per_token(values_B: torch.Tensor, lengths: tuple[int, ...]) -> Ragged:
    """Every token of response i gets `values_B[i]`; float32. Example: per_token(tensor([1., 2.]), (2, 1)).values == [1, 1, 2]."""
    if values_B.shape[0] != len(lengths):
        raise ValueError(f"per_token: {values_B.shape[0]} values for {len(lengths)} responses")
    return Ragged(values_B.to(torch.float32).repeat_interleave(torch.tensor(lengths, dtype=torch.int64)), tuple(lengths))


def group_advantages(batch: Batch, penalty: Ragged | None = None, estimate: GroupEstimate = group_normalised) -> Ragged:
    """`estimate` of a batch's rewards, one value per response token.

    penalty: what each token costs (a KL term, coefficient included); a response's sum is taken off its reward.
    """
    if len(batch) % batch.samples_per_prompt:
        raise ValueError(f"{len(batch)} samples are not whole groups of samples_per_prompt {batch.samples_per_prompt}")
    rewards_B = torch.tensor(batch.rewards, dtype=torch.float64)
    if penalty is not None:
        rewards_B = rewards_B - torch.stack([row.double().sum() for row in penalty.rows()])
    return per_token(estimate(rewards_B.view(-1, batch.samples_per_prompt)).flatten(), batch.responses.lengths)


def token_rewards(batch: Batch, penalty: Ragged | None = None) -> Ragged:
    """float64 reward of each token: -penalty everywhere, and the sample's reward on its last token inside the loss mask.

    With penalty = coefficient * KL this is the reward of RLHF (arXiv 2203.02155, section 3.4), given token by token.
    """
    mask = batch.loss_mask
    values = torch.zeros(sum(mask.lengths), dtype=torch.float64) if penalty is None else -penalty.values.double() * (mask.values > 0)
    start = 0
    for row, reward in zip(mask.rows(), batch.rewards, strict=True):
        inside = row.nonzero()
        if len(inside):
            values[start + int(inside[-1])] += reward
        start += len(row)
    return Ragged(values, mask.lengths)


def gae(rewards: Ragged, values: Ragged, mask: Ragged, gamma: float, lam: float) -> tuple[Ragged, Ragged]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) and the returns that a critic learns, both float32, 0 outside the mask.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, return_t = A_t + V_t. "Next" is the next token inside the
    mask (what a tool wrote is no step of the policy); behind a response's last one both V and A are 0, also when it was cut off.
    """
    rows = list(zip(rewards.rows(), values.rows(), mask.rows(), strict=True))
    advantages = [
        row for first in range(0, len(rows), _ROWS_AT_A_TIME) for row in _gae_rows(rows[first : first + _ROWS_AT_A_TIME], gamma, lam)
    ]
    column = Ragged.from_rows(advantages, torch.float32)
    learnt = torch.where(mask.values > 0, column.values.double() + values.values.double(), 0.0)
    return column, Ragged(learnt.float(), mask.lengths)


def _gae_rows(rows: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], gamma: float, lam: float) -> list[torch.Tensor]:
    """float64 advantages of each (rewards, values, mask)."""
    # [longest row, rows], 0 behind the end of a row: outside the mask, so that nothing flows from there.
    reward_TB, value_TB, mask_TB = (pad_sequence(list(column)).double() for column in zip(*rows, strict=True))
    inside_TB = mask_TB > 0
    advantage_TB = torch.zeros_like(value_TB)
    next_value_B = next_advantage_B = value_TB.new_zeros(len(rows))
    for t in reversed(range(len(value_TB))):
        delta_B = reward_TB[t] + gamma * next_value_B - value_TB[t]
        next_advantage_B = torch.where(inside_TB[t], delta_B + gamma * lam * next_advantage_B, next_advantage_B)
        next_value_B = torch.where(inside_TB[t], value_TB[t], next_value_B)
        advantage_TB[t] = torch.where(inside_TB[t], next_advantage_B, 0.0)
    return [column[: len(row[0])] for column, row in zip(advantage_TB.T, rows, strict=True)]


def reward_to_go(rewards: Ragged, mask: Ragged, gamma: float) -> Ragged:
    """Discounted sum of a token's own and all later rewards of its response: GAE with lam 1 and no critic."""
    nothing = Ragged(torch.zeros(sum(mask.lengths), dtype=torch.float64), mask.lengths)
    return gae(rewards, nothing, mask, gamma, lam=1.0)[0]


def whitened(values: Ragged, mask: Ragged) -> Ragged:
    """(value - mean) / sqrt(variance + 1e-8) over the masked tokens of the whole batch, unbiased variance; 0 outside the mask.

    Give it the batch of all ranks: with a mean of its own, each rank would pull the policy another way.
    """
    inside = mask.values > 0
    chosen = values.values[inside].double()
    if len(chosen) < 2:
        raise ValueError(f"advantages are normalised over the tokens of a batch, which needs at least 2 of them; there are {len(chosen)}")
    # Shifted by the first, so that equal values give exactly 0.
    shifted = chosen - chosen[0]
    answer = torch.zeros(len(inside))
    answer[inside] = ((shifted - shifted.mean()) / (shifted.var() + _VARIANCE_EPSILON).sqrt()).float()
    return Ragged(answer, values.lengths)


def explained_variance(values: Ragged, returns: Ragged, mask: Ragged) -> float:
    """1 - var(returns - values) / var(returns) over the masked tokens: 1 for a perfect critic, 0 for one that knows only the mean.

    0.0 where all returns are equal: there is nothing to explain.
    """
    inside = mask.values > 0
    expected, found = returns.values[inside].double(), values.values[inside].double()
    spread = float(expected.var(correction=0))
    return 1.0 - float((expected - found).var(correction=0)) / spread if spread else 0.0
