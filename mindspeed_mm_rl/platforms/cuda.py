"""CUDA: megatron-core as it is, flash attention over packed sequences."""

from __future__ import annotations

import torch

from mindspeed_mm_rl.platforms.packed_sdpa import Segments, packed_sdpa


def adapt_megatron() -> None:
    """megatron-core is written for CUDA: nothing to adapt."""


def host_memory(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """Varlen flash attention in half precision (causal from the lower right corner); float32, which flash kernels don't take, goes
    through batched SDPA."""
    if query.dtype == torch.float32:
        return packed_sdpa(query, key, value, segments, causal, scale)
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        segments.cu_queries,
        segments.cu_keys,
        max(segments.queries),
        max(segments.keys),
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
