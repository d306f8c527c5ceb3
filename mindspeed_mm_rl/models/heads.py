"""From hidden states to log-probs of given tokens and entropy, without ever holding the logits of a whole batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.utils.checkpoint import checkpoint

from mindspeed_mm_rl.models.qwen2_5_vl import Policy
from mindspeed_mm_rl.types import BAN_BIAS

CHUNK_LOGITS = 2**24
"""Logits held at a time when no chunk size is asked for: 64 MiB in float32."""


def token_logprobs(
    policy: Policy,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    banned_ids: tuple[int, ...] = (),
    with_entropy_grad: bool = False,
    chunk_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of `targets` [N] and entropy of their distributions, both float32 [N], from hidden states [N, H].

    The distribution is the one that is sampled from: logits, bias on banned ids, divided by the temperature, softmax over the
    vocabulary of all tensor-parallel ranks. More than one chunk: each chunk's logits are computed again in the backward pass.
    The entropy has a gradient only with_entropy_grad.
    """
    if temperature <= 0:
        raise ValueError(f"temperature ({temperature}) must be > 0: greedy sampling has no log-probs to train on")
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    chunk = chunk_tokens or max(1, CHUNK_LOGITS * ranks // policy.architecture.text.vocab_size)

    def one_chunk(states: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _LogprobAndEntropy.apply(policy.logits(states), tokens, temperature, banned_ids, with_entropy_grad)

    if len(targets) <= chunk:
        return one_chunk(hidden, targets)
    pairs = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    parts = [checkpoint(one_chunk, states, tokens, use_reentrant=False, preserve_rng_state=False) for states, tokens in pairs]
    logprobs, entropy = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


class _LogprobAndEntropy(torch.autograd.Function):
    """Vocabulary-parallel: every rank holds the logits of its slice of the vocabulary, all of them return the same values."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, temperature: float, banned_ids: tuple[int, ...], with_entropy_grad: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
        shifted = _biased(logits, banned_ids, first).div_(temperature)
        shifted -= _over_vocabulary(shifted.amax(-1), dist.ReduceOp.MAX)[:, None]
        probs = shifted.exp()
        total = _over_vocabulary(probs.sum(-1), dist.ReduceOp.SUM)
        probs /= total[:, None]
        here = (targets >= first) & (targets < first + logits.shape[-1])
        slots = torch.where(here, targets - first, 0)
        chosen = shifted.gather(-1, slots[:, None])[:, 0] * here
        logprobs = _over_vocabulary(chosen, dist.ReduceOp.SUM) - total.log()
        entropy = total.log() - _over_vocabulary((probs * shifted).sum(-1), dist.ReduceOp.SUM)
        ctx.save_for_backward(probs, slots, here, *([shifted, total, entropy] if with_entropy_grad else []))
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        if not with_entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, logprobs_grad: torch.Tensor, entropy_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """d logprob / d logit = onehot - p; d entropy / d logit = -p (log p + entropy)."""
        probs, slots, here, *of_entropy = ctx.saved_tensors
        gradient = probs * -logprobs_grad[:, None]
        gradient.scatter_add_(-1, slots[:, None], (logprobs_grad * here)[:, None])
        if of_entropy:
            shifted, total, entropy = of_entropy
            log_probs = shifted - total.log()[:, None]
            gradient -= entropy_grad[:, None] * probs * (log_probs + entropy[:, None])
        return (gradient / ctx.temperature).to(ctx.dtype), None, None, None, None


def _biased(logits: torch.Tensor, banned_ids: tuple[int, ...], first: int) -> torch.Tensor:
    """A float32 copy with the bias on those banned ids that this rank holds: before the temperature, as the rollout engine does."""
    biased = logits.to(torch.float32, copy=True)
    here = [token - first for token in banned_ids if first <= token < first + logits.shape[-1]]
    if here:
        biased[:, here] += BAN_BIAS
    return biased


def _over_vocabulary(partial: torch.Tensor, operation: dist.ReduceOp) -> torch.Tensor:
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        dist.all_reduce(partial, operation, group=parallel_state.get_tensor_model_parallel_group())
    return partial
