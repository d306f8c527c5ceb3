"""Log-probs, entropy and their gradients against log_softmax in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

VOCAB, HIDDEN, TOKENS = 50, 16, 11
BANNED = (3, 7)


class Linear:
    """A head of one matrix, in the shape of a policy."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.architecture = SimpleNamespace(text=SimpleNamespace(vocab_size=weight.shape[0]))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.weight.T


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    targets = torch.randint(10, VOCAB, (TOKENS,), generator=generator)
    return weight, hidden, targets


def reference(weight: torch.Tensor, hidden: torch.Tensor, targets: torch.Tensor, temperature: float, banned: tuple[int, ...]):
    logits = hidden.double() @ weight.double().T
    bias = torch.zeros(VOCAB, dtype=torch.float64)
    bias[list(banned)] = -100.0
    log_probs = ((logits + bias) / temperature).log_softmax(-1)
    return log_probs.gather(-1, targets[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


def logprobs_and_gradients(problem, temperature: float, banned: tuple[int, ...], chunk: int | None, entropy_weight: float):
    from mindspeed_mm_rl.models.heads import token_logprobs

    weight, hidden, targets = (problem[0].clone().requires_grad_(), problem[1].clone().requires_grad_(), problem[2])
    logprobs, entropy = token_logprobs(Linear(weight), hidden, targets, temperature, banned, entropy_weight > 0, chunk)
    scale = torch.arange(1.0, TOKENS + 1)
    loss = (logprobs * scale).sum() + (entropy * scale).sum() * entropy_weight
    loss.backward()
    return logprobs.detach(), entropy.detach(), weight.grad, hidden.grad


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy_weight", [0.0, 0.3])
def test_values_and_gradients_equal_float64(one_rank, problem, temperature: float, entropy_weight: float):
    logprobs, entropy, weight_grad, hidden_grad = logprobs_and_gradients(problem, temperature, BANNED, None, entropy_weight)
    weight, hidden = problem[0].double().requires_grad_(), problem[1].double().requires_grad_()
    expected, expected_entropy = reference(weight, hidden, problem[2], temperature, BANNED)
    scale = torch.arange(1.0, TOKENS + 1)
    ((expected * scale).sum() + (expected_entropy * scale).sum() * entropy_weight).backward()
    torch.testing.assert_close(logprobs, expected.float(), atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(entropy, expected_entropy.float(), atol=2e-6, rtol=1e-6)
    assert (weight_grad - weight.grad).norm() <= 1e-6 * weight.grad.norm()
    assert (hidden_grad - hidden.grad).norm() <= 1e-6 * hidden.grad.norm()


def test_chunks_change_nothing(one_rank, problem):
    whole = logprobs_and_gradients(problem, 0.7, BANNED, None, 0.3)
    for chunk in (1, 4, 11):
        for part, expected in zip(logprobs_and_gradients(problem, 0.7, BANNED, chunk, 0.3), whole, strict=True):
            torch.testing.assert_close(part, expected, atol=1e-5, rtol=1e-5)


def test_uniform_distribution_by_hand(one_rank):
    from mindspeed_mm_rl.models.heads import token_logprobs

    head = Linear(torch.zeros(VOCAB, HIDDEN))
    logprobs, entropy = token_logprobs(head, torch.ones(2, HIDDEN), torch.tensor([0, 49]), 0.5, BANNED)
    # Two of fifty ids are banned: 48 equal ones are left.
    torch.testing.assert_close(logprobs, torch.full((2,), -math.log(48)))
    torch.testing.assert_close(entropy, torch.full((2,), math.log(48)))


def test_banned_ids_have_no_probability_and_the_vllm_value(one_rank, problem):
    from mindspeed_mm_rl.models.heads import token_logprobs

    weight, hidden, _ = problem
    logprobs, _ = token_logprobs(Linear(weight), hidden, torch.full((TOKENS,), 3), 0.7, BANNED)
    expected, _ = reference(weight, hidden, torch.full((TOKENS,), 3), 0.7, BANNED)
    torch.testing.assert_close(logprobs, expected.float(), atol=1e-4, rtol=1e-6)
    assert logprobs.exp().max() == 0.0


def test_entropy_has_a_gradient_only_when_asked(one_rank, problem):
    from mindspeed_mm_rl.models.heads import token_logprobs

    weight, hidden, targets = problem
    for chunk in (None, 4):
        assert not token_logprobs(Linear(weight), hidden.clone().requires_grad_(), targets, 1.0, (), False, chunk)[1].requires_grad
        assert token_logprobs(Linear(weight), hidden.clone().requires_grad_(), targets, 1.0, (), True, chunk)[1].requires_grad


def test_bfloat16_logits_are_normalised_in_float32(one_rank, problem):
    from mindspeed_mm_rl.models.heads import token_logprobs

    weight, hidden, targets = problem[0].bfloat16(), problem[1].bfloat16(), problem[2]
    logprobs, _ = token_logprobs(Linear(weight), hidden, targets, 0.7)
    logits = (hidden @ weight.T).double() / 0.7
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0].float(), atol=2e-6, rtol=1e-6)


def test_no_tokens_give_empty_values_that_keep_the_graph(one_rank, problem):
    from mindspeed_mm_rl.models.heads import token_logprobs

    hidden = problem[1].clone().requires_grad_()
    logprobs, entropy = token_logprobs(Linear(problem[0]), hidden[:0], problem[2][:0], 1.0)
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert hidden.grad.abs().sum() == 0


def test_zero_temperature_is_refused(one_rank, problem):
    from mindspeed_mm_rl.models.heads import token_logprobs

    with pytest.raises(ValueError, match=r"temperature \(0.0\) must be > 0"):
        token_logprobs(Linear(problem[0]), problem[1], problem[2], 0.0)
