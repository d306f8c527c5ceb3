"""Losses on pairs: values by hand and in float64 from the papers, gradients, masks, and sums that don't depend on how they are cut."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch

from mindspeed_mm_rl.algorithms.preference import OBJECTIVES, PreferenceSettings, loss_of, preference_loss
from mindspeed_mm_rl.config.plan import PreferencePlan
from mindspeed_mm_rl.config.schema import MegatronConfig
from mindspeed_mm_rl.data.packing import micro_batches
from mindspeed_mm_rl.trainer.dpo import measured
from mindspeed_mm_rl.types import Batch, LossInput, Ragged

LENGTHS = (3, 5, 4, 1, 6, 2)
"""Of the responses of three pairs."""


def inputs(logprobs: torch.Tensor, references: torch.Tensor | None, lengths: tuple[int, ...] = LENGTHS, **changes: object) -> LossInput:
    nothing = torch.zeros_like(logprobs)
    x = LossInput(
        logprobs=logprobs,
        entropy=nothing,
        old_logprobs=nothing,
        rollout_logprobs=nothing,
        ref_logprobs=references,
        advantages=nothing,
        loss_mask=torch.ones_like(logprobs),
        sequence_index=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        num_loss_tokens=float(sum(lengths)),
        num_sequences=float(len(lengths)),
    )
    return replace(x, **changes)


def one_pair() -> LossInput:
    """Log-ratios 0.3 + 0.1 = 0.4 (chosen, two tokens) and -0.2 (rejected, one token); log-probs -1.5 and -1.0."""
    return inputs(torch.tensor([-1.0, -0.5, -1.0]), torch.tensor([-1.3, -0.6, -0.8]), (2, 1))


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def odds(mean_logprob: float) -> float:
    return math.exp(mean_logprob) / (1.0 - math.exp(mean_logprob))


# Delta = 0.4 + 0.2 = 0.6; per token 0.2 + 0.2 = 0.4; mean log-probs -0.75 and -1.0; supervised term 1.5 / 2.
BY_HAND = {
    "sigmoid": ({"beta": 0.5}, -math.log(sigmoid(0.3))),
    "conservative": (
        {"beta": 0.5, "label_smoothing": 0.1, "loss_type": "sigmoid"},
        -0.9 * math.log(sigmoid(0.3)) - 0.1 * math.log(sigmoid(-0.3)),
    ),
    "robust": ({"beta": 0.5, "label_smoothing": 0.1}, (-0.9 * math.log(sigmoid(0.3)) + 0.1 * math.log(sigmoid(-0.3))) / 0.8),
    "hinge": ({"beta": 0.5}, 0.7),
    "ipo": ({"beta": 0.5}, (0.4 - 1.0) ** 2),
    "simpo": ({"beta": 2.0, "simpo_gamma": 0.3}, -math.log(sigmoid(2.0 * 0.25 - 0.3))),
    "orpo": ({"beta": 0.2}, -0.2 * math.log(sigmoid(math.log(odds(-0.75) / odds(-1.0)))) + 0.75),
    "supervised": ({"beta": 0.5, "pref_ftx": 0.4, "loss_type": "sigmoid"}, -math.log(sigmoid(0.3)) + 0.4 * 0.75),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_value_by_hand(name: str) -> None:
    options, expected = BY_HAND[name]
    loss, metrics = preference_loss(one_pair(), PreferenceSettings(**{"loss_type": name} | options), num_chosen_tokens=2.0)
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert float(metrics["loss"]) == float(loss)


def test_metrics_by_hand() -> None:
    _, metrics = preference_loss(one_pair(), PreferenceSettings("sigmoid", beta=0.5, pref_ftx=1.0), num_chosen_tokens=2.0)
    expected = {
        "rewards/chosen": 0.2,
        "rewards/rejected": -0.1,
        "rewards/margins": 0.3,
        "rewards/accuracies": 1.0,
        "logps/chosen": -1.5,
        "logps/rejected": -1.0,
        "sft_loss": 0.75,
    }
    assert {name: float(value) for name, value in metrics.items() if name != "loss"} == pytest.approx(expected, rel=1e-6)


def random_pairs(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    policy, references = (-torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64) * 3 - 0.01 for _ in range(2))
    return policy.to(dtype), references.to(dtype)


def all_settings() -> list[PreferenceSettings]:
    smoothed = {"robust": 0.2}
    plain = [PreferenceSettings(name, beta=0.4, label_smoothing=smoothed.get(name, 0.0)) for name in OBJECTIVES]
    return [*plain, PreferenceSettings("sigmoid", beta=0.4, label_smoothing=0.2), PreferenceSettings("ipo", beta=0.4, pref_ftx=0.7)]


def paper(policy: torch.Tensor, references: torch.Tensor, s: PreferenceSettings) -> torch.Tensor:
    """Pair by pair in float64, as the papers write it."""
    rows, base = policy.split(LENGTHS), references.split(LENGTHS)
    total = torch.zeros((), dtype=torch.float64)
    for c in range(0, len(rows), 2):
        sums = [row.sum() for row in rows[c : c + 2]]
        ratios = [row.sum() - ref.sum() for row, ref in zip(rows[c : c + 2], base[c : c + 2], strict=True)]
        means = [row.mean() for row in rows[c : c + 2]]
        delta = s.beta * (ratios[0] - ratios[1])
        right, wrong = -torch.log(1 / (1 + torch.exp(-delta))), -torch.log(1 / (1 + torch.exp(delta)))
        e = s.label_smoothing
        match s.loss_type:
            case "sigmoid":
                loss = (1 - e) * right + e * wrong
            case "robust":
                loss = ((1 - e) * right - e * wrong) / (1 - 2 * e)
            case "hinge":
                loss = torch.clamp(1 - delta, min=0)
            case "ipo":
                loss = (ratios[0] / LENGTHS[c] - ratios[1] / LENGTHS[c + 1] - 1 / (2 * s.beta)) ** 2
            case "simpo":
                loss = -torch.log(1 / (1 + torch.exp(-(s.beta * (means[0] - means[1]) - s.simpo_gamma))))
            case "orpo":
                ratio = (means[0].exp() / (1 - means[0].exp())) / (means[1].exp() / (1 - means[1].exp()))
                loss = -s.beta * torch.log(ratio / (1 + ratio))
        total = total + loss / 3
        total = total - (s.pref_ftx + (s.loss_type == "orpo")) * sums[0] / sum(LENGTHS[::2])
    return total


@pytest.mark.parametrize("settings", all_settings(), ids=lambda s: f"{s.loss_type}_{s.label_smoothing}_{s.pref_ftx}")
def test_value_and_gradient_equal_the_papers_in_float64(settings: PreferenceSettings) -> None:
    policy, references = random_pairs(dtype=torch.float64)
    own, other = policy.clone().requires_grad_(), policy.clone().requires_grad_()
    loss, _ = preference_loss(inputs(own, references), settings, float(sum(LENGTHS[::2])))
    expected = paper(other, references, settings)
    loss.backward()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    torch.testing.assert_close(own.grad, other.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_chosen_response_is_pulled_up_and_the_rejected_one_down(name: str) -> None:
    policy, references = random_pairs()
    policy.requires_grad_()
    smoothing = 0.1 if name == "robust" else 0.0
    loss, _ = preference_loss(inputs(policy, references), PreferenceSettings(name, beta=0.1, label_smoothing=smoothing), 13.0)
    loss.backward()
    for number, gradient in enumerate(policy.grad.split(LENGTHS)):
        assert torch.all(gradient < 0) if number % 2 == 0 else torch.all(gradient > 0)


def swapped(values: torch.Tensor) -> torch.Tensor:
    rows = values.split(LENGTHS)
    return torch.cat([rows[i] for i in (1, 0, 3, 2, 5, 4)])


def test_with_half_of_the_labels_wrong_both_ways_round_cost_the_same() -> None:
    """And with a share e, one way round costs what the other does with 1 - e."""
    policy, references = random_pairs(dtype=torch.float64)
    turned = inputs(swapped(policy), swapped(references), (5, 3, 1, 4, 2, 6))
    for smoothing in (0.5, 0.3, 0.0):
        straight, _ = preference_loss(inputs(policy, references), PreferenceSettings("sigmoid", 0.4, smoothing), 1.0)
        other, _ = preference_loss(turned, PreferenceSettings("sigmoid", 0.4, 1.0 - smoothing), 1.0)
        assert float(straight) == pytest.approx(float(other), rel=1e-12)


def test_robust_is_right_on_average() -> None:
    """(1 - e) loss(labels) + e loss(labels swapped) is DPO's loss on the true labels."""
    policy, references = random_pairs(dtype=torch.float64)
    settings = PreferenceSettings("robust", 0.4, 0.2)
    straight, _ = preference_loss(inputs(policy, references), settings, 1.0)
    turned, _ = preference_loss(inputs(swapped(policy), swapped(references), (5, 3, 1, 4, 2, 6)), settings, 1.0)
    plain, _ = preference_loss(inputs(policy, references), PreferenceSettings("sigmoid", 0.4), 1.0)
    assert float(0.8 * straight + 0.2 * turned) == pytest.approx(float(plain), rel=1e-12)


@pytest.mark.parametrize("settings", all_settings(), ids=lambda s: f"{s.loss_type}_{s.label_smoothing}_{s.pref_ftx}")
def test_nothing_outside_the_mask_counts(settings: PreferenceSettings) -> None:
    policy, references = random_pairs()
    mask = torch.ones(sum(LENGTHS))
    mask[[1, 4, 9]] = 0.0
    losses, gradients = [], []
    for outside in (-1.0, float("nan"), float("-inf")):
        disturbed = torch.where(mask > 0, policy, torch.tensor(outside)).requires_grad_()
        other = torch.where(mask > 0, references, torch.tensor(outside))
        loss, metrics = preference_loss(inputs(disturbed, other, loss_mask=mask), settings, 11.0)
        loss.backward()
        losses.append([float(loss.detach()), *map(float, metrics.values())])
        gradients.append(disturbed.grad)
        assert torch.all(disturbed.grad[mask == 0] == 0) and torch.isfinite(disturbed.grad).all()
    assert losses[0] == losses[1] == losses[2]
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("settings", all_settings(), ids=lambda s: f"{s.loss_type}_{s.label_smoothing}_{s.pref_ftx}")
def test_parts_and_a_pair_without_weight_add_up_to_the_whole(settings: PreferenceSettings) -> None:
    policy, references = random_pairs(dtype=torch.float64)
    policy.requires_grad_()
    whole, metrics = preference_loss(inputs(policy, references), settings, 13.0)
    (expected,) = torch.autograd.grad(whole, policy)
    total, sums = torch.zeros(()), dict.fromkeys(metrics, 0.0)
    for tokens, lengths, weight in ((slice(0, 8), LENGTHS[:2], 1.0), (slice(8, 21), LENGTHS[2:], 1.0), (slice(0, 8), LENGTHS[:2], 0.0)):
        part = inputs(policy[tokens], references[tokens], lengths, num_sequences=6.0)
        loss, found = preference_loss(replace(part, loss_mask=torch.full_like(part.loss_mask, weight)), settings, 13.0)
        total, sums = total + loss, {name: value + float(found[name]) for name, value in sums.items()}
    (gradient,) = torch.autograd.grad(total, policy)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
    assert sums == pytest.approx({name: float(value) for name, value in metrics.items()}, rel=1e-12)


def test_the_configuration_knows_the_losses_and_which_have_a_reference() -> None:
    assert get_args(MegatronConfig.model_fields["dpo_loss_type"].annotation) == tuple(OBJECTIVES)
    for name, objective in OBJECTIVES.items():
        plan = PreferencePlan(name, 0.1, 0.0, 0.5, 0.0, cache_reference=False)
        assert plan.needs_reference == objective.compares_with_reference


def test_a_loss_with_a_reference_asks_for_it() -> None:
    policy, _ = random_pairs()
    with pytest.raises(ValueError, match="no reference log-probs"):
        preference_loss(inputs(policy, None), PreferenceSettings("sigmoid"), 13.0)
    for name in ("simpo", "orpo"):
        assert math.isfinite(float(preference_loss(inputs(policy, None), PreferenceSettings(name), 13.0)[0]))


def test_a_response_that_is_certain_has_finite_odds() -> None:
    policy = torch.zeros(3).requires_grad_()
    loss, _ = preference_loss(inputs(policy, None, (2, 1)), PreferenceSettings("orpo"), 2.0)
    loss.backward()
    assert math.isfinite(float(loss.detach())) and torch.isfinite(policy.grad).all()


def test_long_responses_keep_the_digits_in_which_policy_and_reference_differ() -> None:
    """8192 tokens of about -8 each sum to -65536, where float32 steps are 0.0078; the ratios differ by 1e-6 a token."""
    generator = torch.Generator().manual_seed(0)
    references = -8.0 - torch.rand(16384, generator=generator)
    policy = references.clone()
    policy[:8192] += 2.0**-17
    difference = float((policy - references).double().sum())
    _, metrics = preference_loss(inputs(policy, references, (8192, 8192)), PreferenceSettings("sigmoid", beta=1.0), 8192.0)
    assert float(metrics["rewards/margins"]) == pytest.approx(difference, rel=1e-5)


def batch_of(policy: torch.Tensor, references: torch.Tensor) -> Batch:
    column = Ragged(torch.ones(sum(LENGTHS)), LENGTHS)
    return Batch(
        sample_ids=tuple(range(6)),
        prompts=Ragged.from_rows([[1]] * 6, torch.int64),
        responses=Ragged(torch.ones(sum(LENGTHS), dtype=torch.int64), LENGTHS),
        loss_mask=column,
        rollout_logprobs=column,
        image_keys=((),) * 6,
        rewards=(1.0, 0.0) * 3,
        samples_per_prompt=2,
        old_logprobs=Ragged(policy, LENGTHS),
        ref_logprobs=Ragged(references, LENGTHS),
    )


def test_evaluation_in_pieces_measures_the_loss_of_the_whole() -> None:
    policy, references = random_pairs()
    batch, settings = batch_of(policy, references), PreferenceSettings("sigmoid", pref_ftx=0.5)
    _, metrics = loss_of(batch, settings)(inputs(policy, references))
    found = measured([batch.select([0, 1]), batch.select([2, 3, 4, 5])], settings)
    assert found == pytest.approx({name: float(value) for name, value in metrics.items()}, rel=1e-6)


def test_micro_batches_never_tear_a_pair_apart() -> None:
    lengths = [3, 3, 5, 2, 9, 9, 1, 1]
    assert micro_batches(lengths, 12, together=2) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert micro_batches(lengths, 13, together=2) == [[0, 1, 2, 3], [4, 5], [6, 7]]
    assert micro_batches(lengths, 100, max_samples=4, together=2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert micro_batches(lengths, 100, max_samples=3, together=2) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert micro_batches(lengths, 4, together=2) == [[0, 1], [2, 3], [4, 5], [6, 7]]
