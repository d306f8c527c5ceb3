"""The policy loss: values and gradients by hand, masks, micro-batches, precision."""

from dataclasses import replace
from math import log

import pytest
import torch

from mindspeed_mm_rl.algorithms.losses import PolicyLossSettings, clipped_policy_loss
from mindspeed_mm_rl.types import LossInput

DAPO = PolicyLossSettings(clip_ratio_low=0.2, clip_ratio_high=0.28)
RATIOS = (1.5, 0.5, 1.5, 0.5)
ADVANTAGES = (1.0, -1.0, -1.0, 2.0)
# Per token: min(1.5, 1.28) = 1.28 clipped | max(0.5, 0.8) = 0.8 clipped | max(1.5, 1.28) = 1.5 free | max(-1, -1.6) = -1 free
SURROGATE = (-1.28, 0.8, 1.5, -1.0)


def hand_input(**changes):
    old = torch.tensor([-1.0, -2.0, -0.5, -3.0])
    values = {
        "logprobs": (old + torch.tensor(RATIOS).log()).requires_grad_(),
        "entropy": torch.tensor([0.1, 0.2, 0.3, 0.4]),
        "old_logprobs": old,
        "rollout_logprobs": old - torch.tensor([log(3.0), log(0.5), 0.0, 0.0]),
        "ref_logprobs": old + torch.tensor(RATIOS).log() - log(2.0),
        "advantages": torch.tensor(ADVANTAGES),
        "loss_mask": torch.ones(4),
        "sequence_index": torch.tensor([0, 1, 1, 1]),
        "num_loss_tokens": 4.0,
        "num_sequences": 2.0,
    }
    return LossInput(**{**values, **changes})


def test_token_level_loss_by_hand():
    loss, metrics = clipped_policy_loss(hand_input(ref_logprobs=None), DAPO)
    assert loss.item() == pytest.approx(sum(SURROGATE) / 4, abs=1e-6)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {"pg_loss": 0.005, "entropy": 0.25, "pg_clipfrac": 0.5, "ppo_kl": -log(0.75) / 2, "ratio_mean": 1.0}, abs=1e-6
    )
    assert not any(value.requires_grad for value in metrics.values())


def test_sequence_level_loss_by_hand():
    loss, metrics = clipped_policy_loss(hand_input(), replace(DAPO, token_level_loss=False))
    assert loss.item() == pytest.approx((-1.28 + (0.8 + 1.5 - 1.0) / 3) / 2, abs=1e-6)
    assert metrics["entropy"].item() == pytest.approx(0.25)


def test_equal_clips_bound_both_sides_alike():
    loss, _ = clipped_policy_loss(hand_input(), replace(DAPO, clip_ratio_high=0.2))
    assert loss.item() == pytest.approx((-1.2 + 0.8 + 1.5 - 1.0) / 4, abs=1e-6)


def test_gradient_by_hand():
    x = hand_input()
    clipped_policy_loss(x, DAPO)[0].backward()
    # d(-A r)/dlogp = -A r / 4 where the free branch wins; nothing where the clip does.
    assert x.logprobs.grad.tolist() == pytest.approx([0.0, 0.0, 1.5 / 4, -2 * 0.5 / 4], abs=1e-6)


def test_on_policy_loss_is_zero_in_value_and_pushes_towards_good_samples():
    x = hand_input(advantages=torch.tensor([1.0, -1.0, 1.0, -1.0]))
    x = replace(x, old_logprobs=x.logprobs.detach())
    loss, _ = clipped_policy_loss(x, DAPO)
    loss.backward()
    assert loss.item() == 0.0
    assert x.logprobs.grad.tolist() == [-0.25, 0.25, -0.25, 0.25]


def test_truncated_importance_weights_by_hand():
    x = hand_input()
    loss, metrics = clipped_policy_loss(x, replace(DAPO, rollout_is_cap=2.0))
    # exp(old - rollout) = 3 (capped to 2), 0.5, 1, 1
    assert loss.item() == pytest.approx((-1.28 * 2 + 0.8 * 0.5 + 1.5 - 1.0) / 4, abs=1e-6)
    assert metrics["rollout_is_weight"].item() == pytest.approx(4.5 / 4, abs=1e-6)
    loss.backward()
    assert x.logprobs.grad[2].item() == pytest.approx(1.5 / 4, abs=1e-6)


def test_kl_term_and_entropy_bonus_by_hand():
    x = hand_input(entropy=torch.tensor([0.1, 0.2, 0.3, 0.4], requires_grad=True))
    loss, metrics = clipped_policy_loss(x, replace(DAPO, kl_penalty="kl", kl_coef=0.1, entropy_coeff=0.01))
    assert metrics["kl_loss"].item() == pytest.approx(log(2.0), abs=1e-6)
    assert loss.item() == pytest.approx(0.005 + 0.1 * log(2.0) - 0.01 * 0.25, abs=1e-6)
    loss.backward()
    assert x.entropy.grad.tolist() == pytest.approx([-0.0025] * 4)
    _, metrics = clipped_policy_loss(hand_input(), replace(DAPO, kl_coef=0.1))
    assert metrics["kl_loss"].item() == pytest.approx(0.5 + log(2.0) - 1, abs=1e-6)


@pytest.mark.parametrize(("kind", "slope"), [("kl", 1.0), ("abs", 1.0), ("mse", log(2.0)), ("low_var_kl", 0.5)])
def test_gradient_of_the_kl_term_by_hand(kind, slope):
    x = hand_input()
    clipped_policy_loss(x, replace(DAPO, kl_penalty=kind, kl_coef=0.1))[0].backward()
    # The surrogate of the first two tokens is clipped: what they get is the slope at logprobs - ref = log 2 alone.
    assert x.logprobs.grad[:2].tolist() == pytest.approx([0.1 * slope / 4] * 2, abs=1e-6)


def test_kl_is_measured_also_when_it_is_no_part_of_the_loss():
    """An adaptive coefficient needs it when the KL term is in the reward."""
    loss, metrics = clipped_policy_loss(hand_input(), replace(DAPO, kl_penalty="kl"))
    assert metrics["kl_loss"].item() == pytest.approx(log(2.0), abs=1e-6)
    assert loss.item() == pytest.approx(0.005, abs=1e-6)


def test_kl_term_without_reference_is_refused():
    with pytest.raises(ValueError, match="no reference log-probs"):
        clipped_policy_loss(hand_input(ref_logprobs=None), replace(DAPO, kl_coef=0.1))


def test_a_constant_length_weighs_every_token_alike_by_hand():
    """Dr. GRPO: sums of the two sequences over 8, mean of the two."""
    loss, metrics = clipped_policy_loss(hand_input(), replace(DAPO, loss_length=8, token_level_loss=False))
    assert loss.item() == pytest.approx((-1.28 / 8 + (0.8 + 1.5 - 1.0) / 8) / 2, abs=1e-6)
    assert metrics["entropy"].item() == pytest.approx(0.25)


GSPO = PolicyLossSettings(clip_ratio_low=0.1, clip_ratio_high=0.2, token_level_loss=False, surrogate="sequence_ratio")
CISPO = PolicyLossSettings(clip_ratio_low=1.0, clip_ratio_high=0.2, surrogate="clipped_weight")


def test_sequence_ratio_by_hand():
    x = hand_input(advantages=torch.tensor([1.0, -2.0, -2.0, -2.0]))
    loss, metrics = clipped_policy_loss(x, GSPO)
    # s = 1.5 clipped to 1.2 | s = (0.5 * 1.5 * 0.5) ** (1 / 3) = 0.7211248, below 1 - 0.1, so that -2 * 0.9 is the worse: clipped too
    assert loss.item() == pytest.approx((-1.2 + 1.8) / 2, abs=1e-6)
    assert metrics["pg_clipfrac"].item() == 1.0
    assert metrics["ratio_mean"].item() == pytest.approx((1.5 + 3 * 0.7211248) / 4, abs=1e-6)
    loss.backward()
    assert x.logprobs.grad.tolist() == [0.0] * 4


def test_gradient_of_the_sequence_ratio_by_hand():
    x = hand_input(advantages=torch.tensor([-1.0, 2.0, 2.0, 2.0]))
    clipped_policy_loss(x, GSPO)[0].backward()
    # d(-A s)/dlogp = -A s / length, over two sequences.
    assert x.logprobs.grad.tolist() == pytest.approx([1.5 / 2, *[-2 * 0.7211248 / 3 / 2] * 3], abs=1e-6)


def test_clipped_weight_by_hand():
    x = hand_input()
    loss, metrics = clipped_policy_loss(x, CISPO)
    # weights 1.2 (clipped), 0.5, 1.2 (clipped), 0.5; log-probs old + log ratio
    logprobs = [-1 + log(1.5), -2 + log(0.5), -0.5 + log(1.5), -3 + log(0.5)]
    expected = [-1.2 * logprobs[0], 0.5 * logprobs[1], 1.2 * logprobs[2], -2 * 0.5 * logprobs[3]]
    assert loss.item() == pytest.approx(sum(expected) / 4, abs=1e-6)
    assert metrics["pg_clipfrac"].item() == 0.5
    loss.backward()
    # No token loses its gradient: -A w, whether the weight is clipped or not.
    assert x.logprobs.grad.tolist() == pytest.approx([-1.2 / 4, 0.5 / 4, 1.2 / 4, -1.0 / 4], abs=1e-6)


def test_clipped_weight_with_a_lower_bound():
    loss, _ = clipped_policy_loss(hand_input(advantages=torch.tensor([0.0, 1.0, 0.0, 0.0])), replace(CISPO, clip_ratio_low=0.2))
    assert loss.item() == pytest.approx(-0.8 * (-2 + log(0.5)) / 4, abs=1e-6)


EVERYTHING = replace(DAPO, kl_coef=0.1, entropy_coeff=0.05, rollout_is_cap=1.5)
VARIANTS = {
    "tokens": EVERYTHING,
    "sequences": replace(EVERYTHING, token_level_loss=False),
    "constant": replace(EVERYTHING, loss_length=16),
    "gspo": replace(EVERYTHING, token_level_loss=False, surrogate="sequence_ratio"),
    "cispo": replace(EVERYTHING, surrogate="clipped_weight"),
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_nothing_outside_the_mask_has_an_effect(settings):
    mask = torch.tensor([1.0, 1.0, 0.0, 1.0])
    results = []
    for junk in (0.0, 1e4, float("nan"), float("inf")):
        spoil = torch.tensor([0.0, 0.0, junk, 0.0])
        clean = hand_input(loss_mask=mask, num_loss_tokens=3.0)
        fields = ("entropy", "old_logprobs", "rollout_logprobs", "ref_logprobs", "advantages")
        x = replace(clean, **{name: getattr(clean, name) + spoil for name in fields})
        x = replace(x, logprobs=(clean.logprobs.detach() - spoil).requires_grad_())
        loss, metrics = clipped_policy_loss(x, settings)
        loss.backward()
        results.append((loss.item(), x.logprobs.grad.tolist(), {name: value.item() for name, value in metrics.items()}))
    assert all(result == results[0] for result in results)
    assert results[0][1][2] == 0.0


def test_a_micro_batch_without_loss_tokens_gives_zero_gradient():
    x = hand_input(loss_mask=torch.zeros(4))
    loss, metrics = clipped_policy_loss(x, EVERYTHING)
    loss.backward()
    assert loss.item() == 0.0 and x.logprobs.grad.tolist() == [0.0] * 4
    assert all(value.item() == 0.0 for value in metrics.values())
    empty = torch.empty(0, requires_grad=True)
    nothing = LossInput(empty, *(torch.empty(0) for _ in range(6)), torch.empty(0, dtype=torch.int64), 4.0, 2.0)
    for settings in VARIANTS.values():
        loss, _ = clipped_policy_loss(nothing, settings)
        loss.backward()
        assert loss.item() == 0.0


LENGTHS = (1, 7, 3, 12, 2, 5)


def gradient_in_pieces(settings, samples_per_micro_batch):
    """Gradient of a shared parameter, and summed loss and metrics, of one mini-batch cut into micro-batches."""
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    columns = [-torch.rand(total, generator=generator) * 2 for _ in range(6)]
    mask = (torch.rand(total, generator=generator) > 0.2).float()
    features = torch.randn(total, 5, generator=generator)
    weight = torch.full((5,), 0.1, requires_grad=True)
    owner = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    sums: dict[str, float] = {}
    for first in range(0, len(LENGTHS), samples_per_micro_batch):
        rows = (owner >= first) & (owner < first + samples_per_micro_batch)
        logprobs, entropy, old, rollout, ref, advantages = (column[rows] for column in columns)
        x = LossInput(
            logprobs=logprobs + features[rows] @ weight,
            entropy=entropy + (features[rows] @ weight).square(),
            old_logprobs=old,
            rollout_logprobs=rollout,
            ref_logprobs=ref,
            advantages=advantages + 1.0,
            loss_mask=mask[rows],
            sequence_index=owner[rows] - first,
            num_loss_tokens=float(mask.sum()),
            num_sequences=float(len(LENGTHS)),
        )
        loss, metrics = clipped_policy_loss(x, settings)
        loss.backward()
        for name, value in {"loss": loss.detach(), **metrics}.items():
            sums[name] = sums.get(name, 0.0) + value.item()
    return weight.grad, sums


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("samples_per_micro_batch", [1, 3])
def test_gradient_does_not_depend_on_micro_batches(settings, samples_per_micro_batch):
    whole, whole_sums = gradient_in_pieces(settings, len(LENGTHS))
    pieces, sums = gradient_in_pieces(settings, samples_per_micro_batch)
    assert ((pieces - whole).norm() / whole.norm()).item() <= 1e-6
    assert sums == pytest.approx(whole_sums, rel=1e-5, abs=1e-6)


def test_token_and_sequence_level_differ():
    token, _ = gradient_in_pieces(EVERYTHING, 1)
    sequence, _ = gradient_in_pieces(replace(EVERYTHING, token_level_loss=False), 1)
    assert ((token - sequence).norm() / token.norm()).item() > 1e-2


def test_bfloat16_inputs_are_computed_in_float32():
    x = hand_input()
    low = replace(x, logprobs=x.logprobs.detach().bfloat16().requires_grad_(), advantages=x.advantages.bfloat16())
    loss, _ = clipped_policy_loss(low, DAPO)
    loss.backward()
    assert loss.dtype == torch.float32 and low.logprobs.grad.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: log-probs near -3 are off by up to 0.008, ratios by 0.8 %.
    assert loss.item() == pytest.approx(0.005, abs=0.01)


@pytest.mark.parametrize("settings", [DAPO, GSPO, CISPO], ids=["dapo", "gspo", "cispo"])
def test_a_huge_ratio_keeps_value_and_gradient_finite(settings):
    x = hand_input(old_logprobs=torch.full((4,), -200.0), advantages=torch.full((4,), -1.0))
    loss, _ = clipped_policy_loss(x, settings)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(x.logprobs.grad).all()
