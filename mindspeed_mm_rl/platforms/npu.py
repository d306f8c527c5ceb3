"""Ascend NPU: MindSpeed adapts megatron-core, CANN's fused kernels do attention, norm, rope, SwiGLU and grouped products."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import torch

from mindspeed_mm_rl.platforms import plain
from mindspeed_mm_rl.platforms.grouped import GroupedKernel, grouped_product
from mindspeed_mm_rl.platforms.packed_sdpa import Segments
from mindspeed_mm_rl.platforms.shared_memory import AllocatedMemory, IpcHandle, open_allocated

_MOST_SEQUENCES = 2048
"""Of one call of the fused attention in the TND layout."""
_MASK_SIDE = 2048
"""The kernel wants the upper triangle of one block of this size, whatever the lengths."""
_LOWER_RIGHT, _NO_MASK = 3, 0
"""Its sparse modes."""
_BY_ROWS, _ONE_OUTPUT, _ENDS = 0, 3, 0
"""Of the grouped product: what is cut into groups, of the left matrix; one tensor comes out; the groups are told by their ends."""


@lru_cache(maxsize=1)
def adapt_megatron() -> None:
    """Imports MindSpeed's adaptor, which replaces CUDA calls of megatron-core while it is imported.

    Raises ValueError when MindSpeed isn't installed.
    """
    try:
        # Later branches of MindSpeed leave it to the one who imports them.
        importlib.import_module("torch_npu.contrib.transfer_to_npu")
        with mindspeed_arguments():
            adaptor = importlib.import_module("mindspeed.megatron_adaptor")
    except ImportError as error:
        raise ValueError(
            f"training on NPU needs MindSpeed (branch core_r0.12.1) and what it imports: {error}; see requirements/npu.txt"
        ) from error
    if importlib.util.find_spec("megatron.training") is not None:
        # Beside a whole Megatron-LM tree MindSpeed asks that one's global arguments, which only its own commands set.
        importlib.import_module("megatron.training.global_vars").set_args(adaptor.get_mindspeed_args())


@contextlib.contextmanager
def mindspeed_arguments() -> Iterator[None]:
    """MindSpeed reads the command line of the process while it is imported, and that of a worker is Ray's. Level 0 adapts to the device
    and replaces nothing else: attention, norm, rope, experts and optimizer settings are this package's."""
    own, sys.argv = sys.argv, [*sys.argv[:1], "--optimization-level", "0"]
    try:
        yield
    finally:
        sys.argv = own


def host_memory(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8).pin_memory()


def can_share_memory() -> bool:
    """torch_npu has it since 2.7."""
    return importlib.util.find_spec("torch_npu.multiprocessing") is not None


def shared_memory(num_bytes: int) -> AllocatedMemory:
    return AllocatedMemory(num_bytes, torch.device("npu", torch.npu.current_device()), _give_back)


def _give_back() -> None:
    torch.npu.ipc_collect()
    torch.npu.empty_cache()


def open_shared(handle: IpcHandle) -> torch.Tensor:
    from torch_npu.multiprocessing.reductions import rebuild_npu_tensor

    return open_allocated(handle, rebuild_npu_tensor)


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """npu_fusion_attention in the TND layout, causal from the lower right corner of each sequence."""
    calls = attention_calls(segments)
    queries, keys = ([sum(pair[side] for pair in call) for call in calls] for side in (0, 1))
    parts = zip(query.split(queries), key.split(keys), value.split(keys), calls, strict=True)
    outputs = [_attention(*part, causal=causal, scale=scale) for part in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def attention_calls(segments: Segments) -> list[list[tuple[int, int]]]:
    """Numbers of queries and keys of the segments of each call: the kernel takes so many sequences at once, and no empty ones."""
    lengths = [pair for pair in zip(segments.queries, segments.keys, strict=True) if pair[0]]
    return [lengths[first : first + _MOST_SEQUENCES] for first in range(0, len(lengths), _MOST_SEQUENCES)]


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[tuple[int, int]], causal: bool, scale: float
) -> torch.Tensor:
    import torch_npu

    return torch_npu.npu_fusion_attention(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        query.shape[1],
        "TND",
        atten_mask=_upper_triangle(query.device) if causal else None,
        scale=scale,
        sparse_mode=_LOWER_RIGHT if causal else _NO_MASK,
        actual_seq_qlen=list(accumulate(queries for queries, _ in lengths)),
        actual_seq_kvlen=list(accumulate(keys for _, keys in lengths)),
    )[0]


@lru_cache(maxsize=1)
def _upper_triangle(device: torch.device) -> torch.Tensor:
    """True where nothing is looked at."""
    return torch.ones(_MASK_SIDE, _MASK_SIDE, dtype=torch.bool, device=device).triu(1)


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    import torch_npu

    return torch_npu.npu_rms_norm(hidden, weight, epsilon=eps)[0]


def rope(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return plain.rotated(heads, cos, sin, _rotate)


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    import torch_npu

    # As [tokens, 1, heads, dim] and in one dtype: the kernel doesn't mix them, and angles in bfloat16 would be off by 1/256.
    turned = torch_npu.npu_rotary_mul(heads.float()[:, None], cos[:, None, None], sin[:, None, None])
    return turned[:, 0].to(heads.dtype)


def swiglu(gate_and_up: torch.Tensor) -> torch.Tensor:
    import torch_npu

    return torch_npu.npu_swiglu(gate_and_up, dim=-1)


def grouped_matmul(tokens: torch.Tensor, weights: Sequence[torch.Tensor], counts: Sequence[int]) -> torch.Tensor:
    return grouped_product(GROUPED, tokens, weights, counts) if len(tokens) else plain.grouped_matmul(tokens, weights, counts)


def _rows(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    import torch_npu

    (product,) = torch_npu.npu_grouped_matmul(
        [rows], [matrices], group_list=ends, split_item=_ONE_OUTPUT, group_type=_BY_ROWS, group_list_type=_ENDS
    )
    return product


def _weights(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """One product after the other: the fused one refuses to cut columns before torch_npu 2.7."""
    groups = pairwise((0, *ends.tolist()))
    return torch.stack([left[first:last].t() @ right[first:last] for first, last in groups])


GROUPED = GroupedKernel(rows=_rows, weights=_weights, ends=torch.int64)
