"""Advantages of every algorithm: numbers by hand, and loops in float64 that follow the papers word by word."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log, sqrt

import pytest
import torch

from mindspeed_mm_rl.algorithms.advantages import gae, group_centred, leave_one_out, reward_to_go, token_rewards, whitened
from mindspeed_mm_rl.algorithms.kl import token_kl
from mindspeed_mm_rl.algorithms.losses import ValueLossInput, ValueLossSettings, clipped_value_loss
from mindspeed_mm_rl.algorithms.recipes import ALGORITHMS, RecipeSettings, make_recipe
from mindspeed_mm_rl.types import Batch, LossInput, Ragged

BETA, GAMMA, LAM = 0.1, 0.9, 0.8
LENGTHS = (3, 1, 4, 2)


def ragged(*rows) -> Ragged:
    return Ragged.from_rows(rows, torch.float32)


def random_batch(seed: int = 0, with_gap: bool = False) -> Batch:
    """Two prompts of two samples; with_gap: the second token of the third response is no step of the policy."""
    generator = torch.Generator().manual_seed(seed)

    def column() -> Ragged:
        return Ragged(-torch.rand(sum(LENGTHS), generator=generator), LENGTHS)

    mask = torch.ones(sum(LENGTHS))
    if with_gap:
        mask[5] = 0.0
    tokens = Ragged(torch.zeros(sum(LENGTHS), dtype=torch.int64), LENGTHS)
    return Batch(
        sample_ids=(0, 1, 2, 3),
        prompts=tokens,
        responses=tokens,
        loss_mask=Ragged(mask, LENGTHS),
        rollout_logprobs=column(),
        image_keys=((),) * 4,
        rewards=(1.0, 0.0, 0.5, 2.0),
        samples_per_prompt=2,
        old_logprobs=column(),
        ref_logprobs=column(),
        values=column(),
    )


def settings_of(algorithm: str, **changes) -> RecipeSettings:
    plain = RecipeSettings(algorithm, 0.2, 0.2, True, "kl", 0.0, "fixed", 0.1, 1000.0, 0.0, 0.0, False, "acc", 0, 8)
    return replace(plain, **{"loss_length": 8 if algorithm == "dr_grpo" else 0, "gamma": GAMMA, "lam": LAM, **changes})


def advantages_of(algorithm: str, batch: Batch, **changes) -> list[float]:
    return make_recipe(settings_of(algorithm, **changes)).with_advantages(batch, changes.get("kl_coef", 0.0)).advantages.values.tolist()


def test_centred_and_leave_one_out_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [4.0, 1.0, 1.0, 0.0]])
    assert group_centred(rewards).tolist() == [[0.5, -0.5, -0.5, 0.5], [2.5, -0.5, -0.5, -1.5]]
    # 1 - 1/3, 0 - 2/3, ... | 4 - 2/3, 1 - 5/3, 1 - 5/3, 0 - 2
    expected = [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [10 / 3, -2 / 3, -2 / 3, -2.0]]
    assert leave_one_out(rewards).tolist() == [pytest.approx(row) for row in expected]
    for estimate in (group_centred, leave_one_out):
        assert estimate(torch.full((1, 3), 0.1, dtype=torch.float64)).tolist() == [[0.0] * 3]
        with pytest.raises(ValueError, match="n_samples_per_prompt must be >= 2"):
            estimate(torch.ones(3, 1))


def test_gae_by_hand():
    # Backwards: delta = 1 - 0.5 = 0.5; delta = 0.9 * 0.5 - 0.2 = 0.25, A = 0.25 + 0.72 * 0.5 = 0.61
    advantages, returns = gae(ragged([0.0, 1.0], [2.0]), ragged([0.2, 0.5], [1.5]), ragged([1, 1], [1]), GAMMA, LAM)
    assert advantages.values.tolist() == pytest.approx([0.61, 0.5, 0.5])
    assert returns.values.tolist() == pytest.approx([0.81, 1.0, 2.0])
    assert advantages.lengths == (2, 1)


def test_gae_steps_over_what_the_policy_did_not_write():
    holes = gae(ragged([0.0, 7.0, 1.0, 9.0]), ragged([0.2, 8.0, 0.5, 9.0]), ragged([1, 0, 1, 0]), GAMMA, LAM)
    without = gae(ragged([0.0, 1.0]), ragged([0.2, 0.5]), ragged([1, 1]), GAMMA, LAM)
    for padded, dense in zip(holes, without, strict=True):
        assert padded.values.tolist() == [dense.values[0], 0.0, dense.values[1], 0.0]


@pytest.mark.parametrize("with_gap", [False, True])
def test_gae_equals_the_sum_of_the_paper(with_gap: bool):
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, arXiv 1506.02438, eq. 16, per response, over the steps of the policy."""
    batch = random_batch(with_gap=with_gap)
    rewards = token_rewards(batch)
    advantages, returns = gae(rewards, batch.values, batch.loss_mask, GAMMA, LAM)
    columns = (rewards, batch.values, batch.loss_mask, advantages, returns)
    for reward, value, mask, advantage, learnt in zip(*(column.rows() for column in columns), strict=True):
        steps = mask.nonzero()[:, 0].tolist()
        r, v = [reward[t].item() for t in steps], [*(value[t].item() for t in steps), 0.0]
        delta = [r[t] + GAMMA * v[t + 1] - v[t] for t in range(len(steps))]
        expected = [sum((GAMMA * LAM) ** (k - t) * delta[k] for k in range(t, len(steps))) for t in range(len(steps))]
        assert [advantage[t].item() for t in steps] == pytest.approx(expected, abs=1e-6)
        assert [learnt[t].item() for t in steps] == pytest.approx([a + b for a, b in zip(expected, v, strict=False)], abs=1e-6)


def test_without_a_critic_gae_is_the_discounted_reward():
    assert reward_to_go(ragged([1.0, 0.0, 2.0]), ragged([1, 1, 1]), 0.5).values.tolist() == [1.5, 1.0, 2.0]


def test_rewards_stand_on_the_last_token_of_the_policy():
    batch = replace(random_batch(), loss_mask=ragged([1, 1, 0], [1], [1, 1, 1, 1], [0, 0]))
    assert token_rewards(batch).values.tolist() == [0, 1.0, 0, 0.0, 0, 0, 0, 0.5, 0, 0]
    cost = ragged([0.1, 0.2, 0.3], [0.4], [0.0] * 4, [0.5, 0.5])
    assert token_rewards(batch, cost).values.tolist() == pytest.approx([-0.1, 0.8, 0.0, -0.4, 0, 0, 0, 0.5, 0, 0])


def test_kl_of_the_policy_that_sampled():
    batch = replace(random_batch(with_gap=True), old_logprobs=Ragged(torch.full((10,), -1.0), LENGTHS))
    batch = replace(batch, ref_logprobs=Ragged(torch.full((10,), -1.0 - log(2.0)), LENGTHS))
    assert token_kl(batch, "kl").values.tolist() == pytest.approx([log(2.0)] * 5 + [0.0] + [log(2.0)] * 4, abs=1e-6)
    with pytest.raises(ValueError, match="needs the batch's old and reference log-probs"):
        token_kl(replace(batch, old_logprobs=None), "kl")


def test_whitening_by_hand():
    # Of 1, 2, 3: mean 2, unbiased variance 1.
    answer = whitened(ragged([1.0, 99.0], [2.0, 3.0]), ragged([1, 0], [1, 1]))
    assert answer.values.tolist() == pytest.approx([-1.0, 0.0, 0.0, 1.0], abs=1e-7)
    assert whitened(ragged([0.1, 0.1, 0.1]), ragged([1, 1, 1])).values.tolist() == [0.0] * 3
    with pytest.raises(ValueError, match="at least 2 of them; there are 1"):
        whitened(ragged([1.0]), ragged([1]))


# ---------------------------------------------------------------------- whole recipes, straight from the papers


def kl_rows(batch: Batch) -> list[list[float]]:
    """log(old / reference) of every token inside the mask, float64, by Python loops."""
    columns = (batch.old_logprobs.rows(), batch.ref_logprobs.rows(), batch.loss_mask.rows())
    return [[(a.item() - b.item()) * m.item() for a, b, m in zip(*row, strict=True)] for row in zip(*columns, strict=True)]


def spread(values: list[float]) -> list[float]:
    return [value for value, length in zip(values, LENGTHS, strict=True) for _ in range(length)]


def normalised(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    deviation = sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) + 1e-8)
    return [(value - mean) / deviation for value in values]


def test_dr_grpo_is_the_reward_less_the_mean():
    assert advantages_of("dr_grpo", random_batch()) == pytest.approx(spread([0.5, -0.5, -0.75, 0.75]))


def test_rloo_has_its_kl_term_in_the_reward():
    batch = random_batch()
    total = [reward - BETA * sum(row) for reward, row in zip(batch.rewards, kl_rows(batch), strict=True)]
    expected = [total[0] - total[1], total[1] - total[0], total[2] - total[3], total[3] - total[2]]
    assert advantages_of("rloo", batch, kl_coef=BETA) == pytest.approx(spread(expected), abs=1e-6)


def test_reinforce_plus_plus_is_the_reward_less_the_kl_to_come_over_the_batch():
    batch = random_batch()
    expected = [reward - BETA * sum(row[t:]) for reward, row in zip(batch.rewards, kl_rows(batch), strict=True) for t in range(len(row))]
    assert advantages_of("reinforce_plus_plus", batch, kl_coef=BETA, gamma=1.0) == pytest.approx(normalised(expected), abs=1e-5)
    alone = advantages_of("reinforce_plus_plus", replace(batch, samples_per_prompt=1), kl_coef=BETA, gamma=1.0)
    assert alone == pytest.approx(normalised(expected), abs=1e-5)


def test_reinforce_plus_plus_baseline_centres_within_groups_and_scales_over_the_batch():
    expected = normalised(spread([0.5, -0.5, -0.75, 0.75]))
    assert advantages_of("reinforce_plus_plus_baseline", random_batch()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "gspo", "cispo"])
def test_the_others_normalise_within_groups(algorithm: str):
    root = sqrt(0.5)
    assert advantages_of(algorithm, random_batch()) == pytest.approx(spread([root, -root, -root, root]), abs=1e-5)


@pytest.mark.parametrize("whiten", [False, True])
def test_ppo_has_advantages_and_returns(whiten: bool):
    batch = random_batch(with_gap=True)
    recipe = make_recipe(settings_of("ppo", kl_coef=BETA, use_kl_in_reward=True, advantage_whiten=whiten))
    done = recipe.with_advantages(batch, BETA)
    cost = Ragged(token_kl(batch, "kl").values * BETA, LENGTHS)
    advantages, returns = gae(token_rewards(batch, cost), batch.values, batch.loss_mask, GAMMA, LAM)
    expected = whitened(advantages, batch.loss_mask) if whiten else advantages
    assert done.advantages.values.tolist() == expected.values.tolist()
    assert done.returns.values.tolist() == returns.values.tolist()
    with pytest.raises(ValueError, match="need the critic's values"):
        recipe.with_advantages(replace(batch, values=None), BETA)


def test_the_coefficient_of_the_iteration_is_the_one_that_counts():
    batch = random_batch()
    recipe = make_recipe(settings_of("rloo", kl_coef=BETA))
    assert recipe.with_advantages(batch, BETA).advantages.values.tolist() != recipe.with_advantages(batch, 0.0).advantages.values.tolist()
    assert recipe.with_advantages(batch, 0.0).advantages.values.tolist() == spread([1.0, -1.0, -1.5, 1.5])
    assert recipe.needs_reference and recipe.needs_old_logprobs
    assert not make_recipe(settings_of("rloo")).needs_old_logprobs


def loss_input(batch: Batch, **changes) -> LossInput:
    owner = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    logprobs = (batch.rollout_logprobs.values.clone()).requires_grad_()
    advantages = Ragged(torch.linspace(-1, 2, 10), LENGTHS)
    columns = (batch.old_logprobs, batch.rollout_logprobs, batch.ref_logprobs, advantages, batch.loss_mask)
    x = LossInput(logprobs, torch.zeros(10), *(column.values for column in columns), owner, float(batch.loss_mask.values.sum()), 4.0)
    return replace(x, **changes)


def test_a_kl_term_is_in_the_reward_or_in_the_loss_never_in_both():
    x = loss_input(random_batch())
    for algorithm in ALGORITHMS:
        for in_reward in (False, True):
            recipe = make_recipe(settings_of(algorithm, kl_coef=BETA, use_kl_in_reward=in_reward))
            in_loss = recipe.policy_loss(BETA)(x)[0].item() != recipe.policy_loss(0.0)(x)[0].item()
            assert in_loss != recipe.needs_old_logprobs, algorithm


def test_on_policy_rloo_is_the_gradient_of_the_paper():
    """1/k sum over samples of A_i grad log p(response i), the response's log-prob being a sum: here with loss_length 1."""
    batch = random_batch()
    advantages = torch.tensor(advantages_of("rloo", batch))
    x = loss_input(batch, advantages=advantages)
    x = replace(x, old_logprobs=x.logprobs.detach())
    make_recipe(settings_of("rloo", loss_length=1)).policy_loss(0.0)(x)[0].backward()
    assert x.logprobs.grad.tolist() == pytest.approx((-advantages / 4).tolist())


def test_gspo_loss_equals_the_paper_in_float64():
    """arXiv 2507.18071, eq. 5 to 7: one clipped term per response, whatever token_level_loss says."""
    batch = random_batch()
    advantage = [0.5, -1.0, 2.0, -0.25]
    x = loss_input(batch, advantages=torch.tensor(spread(advantage)))
    terms, start = [], 0
    for i, length in enumerate(LENGTHS):
        ratios = [x.logprobs[t].item() - x.old_logprobs[t].item() for t in range(start, start + length)]
        s = exp(sum(ratios) / length)
        terms.append(min(s * advantage[i], min(max(s, 0.8), 1.2) * advantage[i]))
        start += length
    recipe = make_recipe(settings_of("gspo"))
    assert recipe.policy_loss(0.0)(x)[0].item() == pytest.approx(-sum(terms) / 4, abs=1e-6)


def test_cispo_loss_equals_the_paper_in_float64():
    """arXiv 2506.13585, eq. 4 and 5: sum over all tokens of clip(r) A log p, over the number of tokens."""
    x = loss_input(random_batch())
    total = 0.0
    for logprob, old, advantage in zip(x.logprobs.tolist(), x.old_logprobs.tolist(), x.advantages.tolist(), strict=True):
        total += min(max(exp(logprob - old), 0.8), 1.2) * advantage * logprob
    assert make_recipe(settings_of("cispo")).policy_loss(0.0)(x)[0].item() == pytest.approx(-total / 10, abs=1e-6)


def test_names_are_checked_and_dr_grpo_asks_for_its_constant():
    with pytest.raises(ValueError, match="algorithm 'drgrpo' is not offered; the nearest is 'dr_grpo' of grpo, dapo"):
        make_recipe(settings_of("drgrpo"))
    with pytest.raises(ValueError, match=r"loss_length \(0\) must be above 0"):
        make_recipe(settings_of("dr_grpo", loss_length=0))


# ---------------------------------------------------------------------- the critic


def value_input(**changes) -> ValueLossInput:
    """Errors: inside the range | moved too far, away from the return | moved too far, towards it | outside the mask."""
    x = ValueLossInput(
        values=torch.tensor([0.3, 1.0, 1.0, 5.0], requires_grad=True),
        old_values=torch.tensor([0.2, 0.0, 0.0, 0.0]),
        returns=torch.tensor([1.3, -1.0, 2.0, float("nan")]),
        loss_mask=torch.tensor([1.0, 1.0, 1.0, 0.0]),
        num_loss_tokens=3.0,
    )
    return replace(x, **changes)


def test_clipped_value_loss_by_hand():
    x = value_input()
    loss, metrics = clipped_value_loss(x, ValueLossSettings(cliprange_value=0.5))
    # (0.3 - 1.3)^2 = 1 | max((1 + 1)^2, (0.5 + 1)^2) = 4, free | max((1 - 2)^2, (0.5 - 2)^2) = 2.25, clipped
    assert loss.item() == pytest.approx((1 + 4 + 2.25) / 3 / 2, abs=1e-6)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {"vf_loss": loss.item(), "vf_clipfrac": 1 / 3, "values_mean": 2.3 / 3}, abs=1e-6
    )
    loss.backward()
    assert x.values.grad.tolist() == pytest.approx([-1.0 / 3, 2.0 / 3, 0.0, 0.0], abs=1e-6)


def test_no_value_range_is_the_squared_error():
    loss, metrics = clipped_value_loss(value_input(), ValueLossSettings(cliprange_value=0.0))
    assert loss.item() == pytest.approx((1 + 4 + 1) / 3 / 2, abs=1e-6)
    assert metrics["vf_clipfrac"].item() == 0.0


def test_value_loss_does_not_depend_on_micro_batches():
    whole = value_input()
    clipped_value_loss(whole, ValueLossSettings())[0].backward()
    columns = ("values", "old_values", "returns", "loss_mask")
    gradient = []
    for rows in (slice(0, 1), slice(1, 4)):
        part = replace(whole, **{name: getattr(whole, name).detach()[rows] for name in columns})
        part = replace(part, values=part.values.requires_grad_())
        clipped_value_loss(part, ValueLossSettings())[0].backward()
        gradient += part.values.grad.tolist()
    assert gradient == pytest.approx(whole.values.grad.tolist())
