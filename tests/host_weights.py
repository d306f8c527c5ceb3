"""Whole tensors in a shared buffer, as processes that train would have written them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mindspeed_mm_rl.weights.host import HostBuffer, WeightHandle, open_views


def new_buffer(tensors: Iterable[tuple[str, torch.Tensor]]) -> HostBuffer:
    return HostBuffer((name, tensor.shape, tensor.dtype) for name, tensor in tensors)


def fill(buffer: HostBuffer, tensors: Iterable[tuple[str, torch.Tensor]]) -> WeightHandle:
    views = dict(open_views(buffer.handle()))
    for name, tensor in tensors:
        views[name].copy_(tensor)
    return buffer.handle()
