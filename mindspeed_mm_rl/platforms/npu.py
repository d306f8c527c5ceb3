"""Ascend NPU: MindSpeed adapts megatron-core, CANN's fused kernel attends over packed sequences."""

from __future__ import annotations

import importlib
from functools import lru_cache

import torch

from mindspeed_mm_rl.platforms.packed_sdpa import Segments


@lru_cache(maxsize=1)
def adapt_megatron() -> None:
    """Imports MindSpeed's adaptor, which replaces CUDA calls of megatron-core while it is imported.

    Raises ValueError when MindSpeed isn't installed.
    """
    try:
        importlib.import_module("mindspeed.megatron_adaptor")
    except ImportError as error:
        raise ValueError("training on NPU needs MindSpeed (branch core_r0.12.1): install it, see requirements/npu.txt") from error


def host_memory(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8).pin_memory()


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """npu_fusion_attention in the TND layout; sparse_mode 3 is causal from the lower right corner of each sequence."""
    import torch_npu

    # The kernel wants the upper triangle of one 2048 x 2048 block, whatever the lengths.
    mask = torch.ones(2048, 2048, dtype=torch.bool, device=query.device).triu(1) if causal else None
    return torch_npu.npu_fusion_attention(
        query,
        key,
        value,
        query.shape[1],
        "TND",
        atten_mask=mask,
        scale=scale,
        sparse_mode=3 if causal else 0,
        actual_seq_qlen=segments.cu_queries[1:].tolist(),
        actual_seq_kvlen=segments.cu_keys[1:].tolist(),
    )[0]
