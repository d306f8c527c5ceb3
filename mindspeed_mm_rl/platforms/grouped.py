"""Grouped matrix product with a gradient, out of the two products that devices have kernels for.

forward   rows of group e of tokens [T, in]   x  weight e transposed      --rows-->    [T, out]
backward  rows of group e of gradient [T, out] x  weight e                --rows-->    [T, in]
          sum over the rows of group e of gradient^T tokens               --weights--> [groups, out, in]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch


@dataclass(frozen=True)
class GroupedKernel:
    rows: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """[T, k], [groups, k, n], ends of the groups -> [T, n]"""
    weights: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """[T, m], [T, n], ends of the groups -> [groups, m, n]"""
    ends: torch.dtype


def grouped_product(kernel: GroupedKernel, tokens: torch.Tensor, weights: Sequence[torch.Tensor], counts: Sequence[int]) -> torch.Tensor:
    """tokens [T, in], a weight [out, in] and a number of tokens for each group -> [T, out]; T > 0."""
    return _GroupedProduct.apply(kernel, tuple(counts), tokens, *weights)


class _GroupedProduct(torch.autograd.Function):
    """Kernels want the weights side by side. Those of the backward are brought together anew, or every layer would keep a copy."""

    @staticmethod
    def forward(ctx: Any, kernel: GroupedKernel, counts: tuple[int, ...], tokens: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        ends = torch.tensor(list(accumulate(counts)), dtype=kernel.ends, device=tokens.device)
        ctx.kernel, ctx.counts = kernel, counts
        ctx.save_for_backward(ends, tokens, *weights)
        return kernel.rows(tokens.contiguous(), torch.stack(weights).transpose(1, 2), ends)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ends, tokens, *weights = ctx.saved_tensors
        gradient = gradient.contiguous()
        needs_tokens, needs_weights = ctx.needs_input_grad[2], any(ctx.needs_input_grad[3:])
        tokens_grad = ctx.kernel.rows(gradient, torch.stack(weights), ends) if needs_tokens else None
        if not needs_weights:
            return None, None, tokens_grad, *(None for _ in weights)
        weights_grad = ctx.kernel.weights(gradient, tokens.contiguous(), ends)
        for of_group, count in zip(weights_grad, ctx.counts, strict=True):
            # Kernels need not write where there is nothing to add up.
            if not count:
                of_group.zero_()
        return None, None, tokens_grad, *weights_grad.unbind(0)
