"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) over packed sequences.

hidden --linear_q_down_proj--> norm --linear_q_up_proj--> per head: plain part | part that rope turns
       --linear_kv_down_proj--> norm --linear_kv_up_proj--> per head: plain part of the key | value
                           '--> the key's part that rope turns, one for all heads

Megatron's own brings its rope along, which knows neither the layout of a pack nor its share of a rank. Parameter names are the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import checkpoint, copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from mindspeed_mm_rl.models.attention import LayoutParams, PackedLayout, attend
from mindspeed_mm_rl.models.families import LatentAttention
from mindspeed_mm_rl.models.norm import RMSNorm
from mindspeed_mm_rl.platforms import device


class WholeLinear(torch.nn.Module):
    """weight [out, in], whole on every tensor-parallel rank, which applies it to its own tokens."""

    def __init__(self, config: TransformerConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, device=device.current(), dtype=config.params_dtype))
        config.init_method(self.weight)
        # Megatron sums the gradients of so marked parameters over the tensor-parallel ranks, each of which sees some tokens only.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight)


class LatentSelfAttention(MegatronModule):
    def __init__(self, config: TransformerConfig, latent: LatentAttention, **_: Any) -> None:
        super().__init__(config=config)
        self.latent = latent
        heads, hidden, eps = config.num_attention_heads, config.hidden_size, config.layernorm_epsilon
        self.heads = heads // config.tensor_model_parallel_size
        rows = heads * latent.qk_head_dim
        if latent.q_lora_rank:
            self.linear_q_down_proj = WholeLinear(config, hidden, latent.q_lora_rank)
            self.q_layernorm = RMSNorm(config, latent.q_lora_rank, eps)
            self.linear_q_up_proj = _by_heads(config, latent.q_lora_rank, rows)
        else:
            self.linear_q_proj = _by_heads(config, hidden, rows)
        self.linear_kv_down_proj = WholeLinear(config, hidden, latent.kv_lora_rank + latent.qk_rope_head_dim)
        self.kv_layernorm = RMSNorm(config, latent.kv_lora_rank, eps)
        self.linear_kv_up_proj = _by_heads(config, latent.kv_lora_rank, heads * (latent.qk_nope_head_dim + latent.v_head_dim))
        self.linear_proj = RowParallelLinear(
            heads * latent.v_head_dim,
            hidden,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packed_seq_params: LayoutParams | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """[T, 1, hidden] -> [T, 1, hidden]; under sequence parallelism T / ranks tokens go in and come out."""
        layout = packed_seq_params.layouts["full"]
        key, value = self._key_value(hidden_states, layout)
        output = self._attended(layout, self._query(hidden_states, layout), key, value)
        return self.linear_proj(output.flatten(1)[:, None])[0], None

    def _attended(self, layout: PackedLayout, *heads: torch.Tensor) -> torch.Tensor:
        def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return attend(query, key, value, layout, self.latent.softmax_scale)

        if self.config.recompute_granularity == "selective" and self.training:
            return checkpoint(run, False, *heads)
        return run(*heads)

    def _query(self, hidden: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        """[T, heads of this rank, qk_head_dim]"""
        if self.latent.q_lora_rank:
            query = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden)))[0]
        else:
            query = self.linear_q_proj(hidden)[0]
        plain, turned = self._split(query, self.latent.qk_nope_head_dim, self.latent.qk_rope_head_dim)
        return torch.cat([plain, _turn(turned, layout)], dim=-1)

    def _key_value(self, hidden: torch.Tensor, layout: PackedLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, heads of this rank, qk_head_dim] and [T, heads of this rank, v_head_dim]"""
        small, turned = self.linear_kv_down_proj(hidden).split([self.latent.kv_lora_rank, self.latent.qk_rope_head_dim], dim=-1)
        plain, value = self._split(
            self.linear_kv_up_proj(self.kv_layernorm(small))[0], self.latent.qk_nope_head_dim, self.latent.v_head_dim
        )
        if self.config.sequence_parallel:
            turned = gather_from_sequence_parallel_region(turned, tensor_parallel_output_grad=True)
        else:
            # The heads of every rank have a gradient for it.
            turned = copy_to_tensor_model_parallel_region(turned)
        return torch.cat([plain, _turn(turned, layout).expand(-1, self.heads, -1)], dim=-1), value

    def _split(self, heads: torch.Tensor, *sizes: int) -> tuple[torch.Tensor, ...]:
        return heads.view(heads.shape[0], self.heads, -1).split(sizes, dim=-1)


def _by_heads(config: TransformerConfig, inputs: int, outputs: int) -> ColumnParallelLinear:
    return ColumnParallelLinear(inputs, outputs, config=config, init_method=config.init_method, bias=False, gather_output=False)


def _turn(pairs: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """Rope where pairs stand side by side, as DeepSeek has them; the halves it leaves apart are so in queries and keys alike."""
    return device.rope(pairs.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), layout.cos, layout.sin)


def latent_attention_spec(latent: LatentAttention) -> ModuleSpec:
    return ModuleSpec(module=LatentSelfAttention, params={"latent": latent})
