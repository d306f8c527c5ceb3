"""The losses on pairs against their papers, written out for single pairs in float64, with the derivatives worked out by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch

from mindspeed_mm_rl.algorithms.preference import PreferenceSettings, preference_loss
from mindspeed_mm_rl.types import LossInput

BETA, SMOOTHING, GAMMA = 0.7, 0.2, 0.4
LENGTHS = ((3, 5), (1, 1), (7, 2), (4, 9), (2, 6))
"""Tokens of the chosen and of the rejected response; some of them are masked besides."""


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def dpo(margin):
    """arXiv 2305.18290, equation 7, with the labels of a share of pairs taken to be swapped."""
    p = sigmoid(BETA * margin)
    return -(1 - SMOOTHING) * math.log(p) - SMOOTHING * math.log(1 - p), BETA * (p - 1 + SMOOTHING)


def robust(margin):
    """arXiv 2403.00409: ((1 - e) L(chosen > rejected) - e L(rejected > chosen)) / (1 - 2 e)."""
    p = sigmoid(BETA * margin)
    loss = (-(1 - SMOOTHING) * math.log(p) + SMOOTHING * math.log(1 - p)) / (1 - 2 * SMOOTHING)
    return loss, -BETA * ((1 - SMOOTHING) * (1 - p) + SMOOTHING * p) / (1 - 2 * SMOOTHING)


def hinge(margin):
    """arXiv 2309.06657: max(0, 1 - b margin)."""
    return max(0.0, 1 - BETA * margin), -BETA if BETA * margin < 1 else 0.0


def ipo(margin):
    """arXiv 2310.12036, equation 17: (margin - 1 / 2 b)^2."""
    return (margin - 1 / (2 * BETA)) ** 2, 2 * (margin - 1 / (2 * BETA))


def simpo(margin):
    """arXiv 2405.14734, equation 6: -log sigmoid(b margin - gamma)."""
    p = sigmoid(BETA * margin - GAMMA)
    return -math.log(p), -BETA * (1 - p)


MARGIN_LOSSES = {"sigmoid": dpo, "robust": robust, "hinge": hinge, "ipo": ipo, "simpo": simpo}
PER_TOKEN = ("ipo", "simpo", "orpo")


def orpo(chosen, rejected):
    """arXiv 2403.07691, equations 4 to 7: -b log sigmoid(log(odds(chosen) / odds(rejected))), p = exp(log-prob per token)."""
    p, q = math.exp(chosen), math.exp(rejected)
    share = sigmoid(math.log(p / (1 - p)) - math.log(q / (1 - q)))
    return -BETA * math.log(share), -BETA * (1 - share) / (1 - p), BETA * (1 - share) / (1 - q)


def of_a_pair(loss_type, chosen, rejected):
    """Loss, its derivatives by the score of either response."""
    if loss_type == "orpo":
        return orpo(chosen, rejected)
    loss, slope = MARGIN_LOSSES[loss_type](chosen - rejected)
    return loss, slope, -slope


def expected(loss_type, pairs, pref_ftx):
    """pairs: of each response [(log-prob, reference's, mask), ...]. The loss, and its derivative by every log-prob in order."""
    chosen_tokens = sum(mask for chosen, _ in pairs for *_, mask in chosen)
    supervised = pref_ftx + (1.0 if loss_type == "orpo" else 0.0)
    total, gradient = 0.0, []
    for pair in pairs:
        counts = [sum(mask for *_, mask in response) if loss_type in PER_TOKEN else 1 for response in pair]
        with_reference = loss_type not in ("simpo", "orpo")
        scores = [sum((p - with_reference * r) * m for p, r, m in response) / n for response, n in zip(pair, counts, strict=True)]
        loss, *slopes = of_a_pair(loss_type, *scores)
        total += loss / len(pairs) - supervised * sum(p * m for p, _, m in pair[0]) / chosen_tokens
        for response, n, slope, weight in zip(pair, counts, slopes, (supervised, 0.0), strict=True):
            gradient += [m * (slope / n / len(pairs) - weight / chosen_tokens) for *_, m in response]
    return total, gradient


def draw_pairs():
    dice = random.Random(5)

    def response(length):
        masks = [1.0] * length if length < 3 else [1.0, 0.0, *[1.0] * (length - 2)]
        return [(-dice.uniform(0.1, 3), -dice.uniform(0.1, 3), mask) for mask in masks]

    return [(response(c), response(r)) for c, r in LENGTHS]


@pytest.mark.parametrize("pref_ftx", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", [*MARGIN_LOSSES, "orpo"])
def test_loss_and_gradient_are_those_of_the_paper(loss_type, pref_ftx):
    pairs = draw_pairs()
    flat = torch.tensor([token for pair in pairs for response in pair for token in response], dtype=torch.float64)
    lengths = torch.tensor([len(response) for pair in pairs for response in pair])
    logprobs = flat[:, 0].clone().requires_grad_()
    zeros = torch.zeros_like(flat[:, 0])
    inputs = LossInput(
        logprobs=logprobs,
        entropy=zeros,
        old_logprobs=zeros,
        rollout_logprobs=zeros,
        ref_logprobs=flat[:, 1],
        advantages=zeros,
        loss_mask=flat[:, 2],
        sequence_index=torch.repeat_interleave(torch.arange(len(lengths)), lengths),
        num_loss_tokens=float(flat[:, 2].sum()),
        num_sequences=float(len(lengths)),
    )
    settings = PreferenceSettings(loss_type, BETA, SMOOTHING, GAMMA, pref_ftx)
    chosen_tokens = float(sum(mask for chosen, _ in pairs for *_, mask in chosen))
    loss, _ = preference_loss(inputs, settings, chosen_tokens)
    loss.backward()
    value, gradient = expected(loss_type, pairs, pref_ftx)
    assert float(loss.detach()) == pytest.approx(value, rel=1e-12)
    assert logprobs.grad.tolist() == pytest.approx(gradient, rel=1e-10, abs=1e-15)
    assert any(gradient)
