"""The gated MLP of Llama and Qwen: megatron's layers around the device's own SwiGLU."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from mindspeed_mm_rl.platforms import device

LINEARS = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


class GatedMLP(MLP):
    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[..., hidden] -> [..., hidden], and the bias that the layer adds to it."""
        gate_and_up, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(device.swiglu(gate_and_up if bias is None else gate_and_up + bias))


def mlp_spec() -> ModuleSpec:
    return ModuleSpec(module=GatedMLP, submodules=LINEARS)
