"""Core attention over packed sequences: megatron's layers project, this rotates and attends.

`PackedLayout` says which tokens of a pack belong together and where they stand; it reaches the core attention as
`packed_seq_params`, the argument that every version of megatron hands through untouched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from mindspeed_mm_rl.models.context_parallel import ContextShare, attend_over_ranks
from mindspeed_mm_rl.models.norm import RMSNorm
from mindspeed_mm_rl.platforms import device
from mindspeed_mm_rl.platforms.packed_sdpa import Segments


@dataclass(frozen=True)
class PackedLayout:
    """Sequences one behind the other, of which this process has T tokens: all of them, or its context-parallel share."""

    segments: Segments
    """Of the whole pack."""
    cos: torch.Tensor
    """float32 [T, head_dim]"""
    sin: torch.Tensor
    causal: bool
    share: ContextShare | None = None
    padding: int = 0
    """Tokens behind the last sequence, a sequence of their own, that make the pack divisible by the ranks that share it."""

    @staticmethod
    def of(lengths: Sequence[int], cos: torch.Tensor, sin: torch.Tensor, causal: bool) -> PackedLayout:
        lengths = tuple(int(length) for length in lengths)
        if sum(lengths) != cos.shape[0]:
            raise ValueError(f"PackedLayout: lengths sum to {sum(lengths)}, but there are {cos.shape[0]} positions")
        return PackedLayout(Segments.of(lengths, lengths, cos.device), cos, sin, causal)


@dataclass
class LayoutParams(PackedSeqParams):
    """What megatron carries to the core attention of each layer. Example: LayoutParams.of({"full": layout})."""

    layouts: dict[str, PackedLayout] | None = None
    """By name: a vision encoder has one for its windows and one for whole frames."""

    @staticmethod
    def of(layouts: dict[str, PackedLayout]) -> LayoutParams:
        segments = next(iter(layouts.values())).segments
        longest = max(segments.keys)
        return LayoutParams(
            qkv_format="thd",
            cu_seqlens_q=segments.cu_queries,
            cu_seqlens_kv=segments.cu_keys,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            layouts=layouts,
        )


class CoreAttention(MegatronModule):
    """softmax(rope(q) rope(k)^T / sqrt(d)) v within each sequence of the layout that `layout_name` picks."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        layout_name: str = "full",
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.layout_name = layout_name
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: LayoutParams | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """query [T, heads, dim], key and value [T, kv_heads, dim] -> [T, heads * dim]; heads are those of this tensor-parallel rank."""
        layout = packed_seq_params.layouts[self.layout_name]
        query = device.rope(query, layout.cos, layout.sin)
        key = device.rope(key, layout.cos, layout.sin)
        return attend(query, key, value, layout, self.scale).flatten(1)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, scale: float) -> torch.Tensor:
    """query [T, heads, dim], key and value [T, kv_heads, dim], all rotated -> [T, heads, value dim]."""

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments) -> torch.Tensor:
        return device.packed_attention(query, key, value, segments, layout.causal, scale)

    if layout.share is None:
        return kernel(query, key, value, layout.segments)
    return attend_over_ranks(query, key, value, layout.share, kernel)


def self_attention_spec(layout_name: str = "full", qk_norm: bool = False) -> ModuleSpec:
    """Attention out of megatron's parallel layers and this package's core attention.

    qk_norm: RMSNorm over the head_dim of each query and key head (Qwen3, arXiv:2505.09388, section 2).
    """
    head_norm = RMSNorm if qk_norm else IdentityOp
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=ModuleSpec(module=CoreAttention, params={"layout_name": layout_name}),
            linear_proj=RowParallelLinear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )


def transformer_layer_spec(attention: ModuleSpec, mlp: ModuleSpec) -> ModuleSpec:
    """A pre-norm layer with this package's norm."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
