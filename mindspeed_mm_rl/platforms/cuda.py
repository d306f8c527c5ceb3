"""CUDA: megatron-core as it is, torch's flash attention over packed sequences, fused norm and grouped product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.multiprocessing import reductions

from mindspeed_mm_rl.platforms import plain
from mindspeed_mm_rl.platforms.compat import supported_arguments
from mindspeed_mm_rl.platforms.grouped import GroupedKernel, grouped_product
from mindspeed_mm_rl.platforms.packed_sdpa import Segments, packed_sdpa
from mindspeed_mm_rl.platforms.plain import rope, swiglu
from mindspeed_mm_rl.platforms.shared_memory import AllocatedMemory, IpcHandle, open_allocated

__all__ = [
    "adapt_megatron",
    "can_share_memory",
    "grouped_matmul",
    "host_memory",
    "open_shared",
    "packed_attention",
    "rms_norm",
    "rope",
    "shared_memory",
    "swiglu",
]

_ALIGNED = 8
"""Rows of the grouped product's matrices must be multiples of 16 bytes."""


def adapt_megatron() -> None:
    """megatron-core is written for CUDA: nothing to adapt."""


def host_memory(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def can_share_memory() -> bool:
    return True


def shared_memory(num_bytes: int) -> AllocatedMemory:
    return AllocatedMemory(num_bytes, torch.device("cuda", torch.cuda.current_device()), _give_back)


def _give_back() -> None:
    torch.cuda.ipc_collect()
    torch.cuda.empty_cache()


def open_shared(handle: IpcHandle) -> torch.Tensor:
    return open_allocated(handle, reductions.rebuild_cuda_tensor)


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
        # torch 2.11 takes fewer heads of keys without being told.
        **supported_arguments(varlen_attn, {"enable_gqa": query.shape[1] != key.shape[1]}),
    )


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """In half precision the product with the weight is rounded once, where Hugging Face rounds the norm before it too."""
    return F.rms_norm(hidden, weight.shape, weight, eps)


def grouped_matmul(tokens: torch.Tensor, weights: Sequence[torch.Tensor], counts: Sequence[int]) -> torch.Tensor:
    """One kernel for all groups in bfloat16; other dtypes and sizes that it doesn't take go one group after the other."""
    taken = tokens.dtype == torch.bfloat16 and len(tokens) and not any(side % _ALIGNED for side in weights[0].shape)
    return grouped_product(GROUPED, tokens, weights, counts) if taken else plain.grouped_matmul(tokens, weights, counts)


def _rows(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return F.grouped_mm(rows, matrices, offs=ends)


def _weights(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return F.grouped_mm(left.t(), right, offs=ends)


GROUPED = GroupedKernel(rows=_rows, weights=_weights, ends=torch.int32)
