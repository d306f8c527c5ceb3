"""RMSNorm that allows sequence parallelism; megatron's own needs Transformer Engine for that."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from mindspeed_mm_rl.platforms import device


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight, computed in float32 (arXiv:1910.07467)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device.current()))
        # Megatron sums the gradients of so marked parameters over the tensor-parallel ranks, each of which sees some tokens only.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return device.rms_norm(hidden, self.weight, self.eps)
