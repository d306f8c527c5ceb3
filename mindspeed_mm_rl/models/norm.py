"""RMSNorm that allows sequence parallelism; megatron's own needs Transformer Engine for that."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from mindspeed_mm_rl.platforms import device


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight in float32, cast back before the weight, as Hugging Face does (arXiv:1910.07467)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device.current()))
        # Megatron sums the gradients of so marked parameters over the tensor-parallel ranks, each of which sees some tokens only.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return _RMSNorm.apply(hidden, self.weight, self.eps)


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
