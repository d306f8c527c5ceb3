"""Kernels out of plain torch: what every device can do, and what the fused ones are measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

Rotate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _RMSNorm.apply(hidden, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """One node for the five of autograd; on CPU a norm costs as much as a small matrix product otherwise."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = hidden.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(hidden, weight, inverse)
        return (wide * inverse).to(hidden.dtype) * weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        hidden, weight, inverse = ctx.saved_tensors
        normed = hidden.float() * inverse
        wide = gradient.float()
        weight_grad = (wide * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        hidden_grad = None
        if ctx.needs_input_grad[0]:
            scaled = wide * weight.float()
            projection = (scaled * normed).mean(-1, keepdim=True)
            hidden_grad = (torch.addcmul(scaled, normed, projection, value=-1) * inverse).to(hidden.dtype)
        return hidden_grad, weight_grad, None


def rope(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return rotated(heads, cos, sin, _rotate)


def rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotate: Rotate) -> torch.Tensor:
    """heads turned by `rotate`, forward and backward."""
    return _Rotation.apply(heads, cos, sin, rotate)


class _Rotation(torch.autograd.Function):
    """A rotation's gradient is the rotation back: nothing but cos and sin is kept, where autograd would keep four tensors."""

    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotate: Rotate) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.rotate = rotate
        return rotate(heads, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return ctx.rotate(gradient, cos, -sin), None, None, None


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1] // 2
    first, second = heads.float().split(half, dim=-1)
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(heads.dtype)


def swiglu(gate_and_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def grouped_matmul(tokens: torch.Tensor, weights: Sequence[torch.Tensor], counts: Sequence[int]) -> torch.Tensor:
    """One group after the other; a group without tokens gets a gradient of zeros."""
    return torch.cat([F.linear(part, weight) for part, weight in zip(tokens.split(list(counts)), weights, strict=True)])
