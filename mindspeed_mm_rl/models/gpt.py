"""The text decoder: the shape of Llama and Qwen on megatron's GPTModel, from token embeddings to the states before the head."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from mindspeed_mm_rl.models.attention import LayoutParams, PackedLayout, transformer_layer_spec
from mindspeed_mm_rl.models.families import TextArchitecture
from mindspeed_mm_rl.models.norm import RMSNorm
from mindspeed_mm_rl.platforms.compat import supported_arguments


@dataclass(frozen=True)
class ModelOptions:
    """How a model is laid out and run, whatever its architecture. Example: ModelOptions(dtype=torch.bfloat16)."""

    dtype: torch.dtype = torch.float32
    recompute: bool = False
    """Keep only the input of each layer and run the layer again in the backward pass."""
    deterministic: bool = False
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    context_parallel_size: int = 1
    sequence_parallel: bool = False


def transformer_config(options: ModelOptions, **shape: Any) -> TransformerConfig:
    """What the text decoder and the vision encoder share. Fused kernels are off: they need CUDA extensions."""
    if options.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype {options.dtype} is not offered; float32 and bfloat16 are")
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1} if options.recompute else {}
    arguments = {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "params_dtype": options.dtype,
        "pipeline_dtype": options.dtype,
        "bf16": options.dtype == torch.bfloat16,
        # Must be known before DDP is built: gradients are then sums, and the loss carries its own denominators.
        "calculate_per_token_loss": True,
        "variable_seq_lengths": True,
        # 0.16 refuses variable lengths with the default dispatcher, in dense models too.
        "moe_token_dispatcher_type": "alltoall",
        "deterministic_mode": options.deterministic,
        "tensor_model_parallel_size": options.tensor_parallel_size,
        "context_parallel_size": options.context_parallel_size,
    }
    return TransformerConfig(**supported_arguments(TransformerConfig, arguments | recompute | shape))


def text_config(text: TextArchitecture, options: ModelOptions) -> TransformerConfig:
    return transformer_config(
        options,
        num_layers=text.num_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_attention_heads=text.num_heads,
        num_query_groups=text.num_kv_heads,
        kv_channels=text.head_dim,
        layernorm_epsilon=text.rms_norm_eps,
        add_bias_linear=False,
        add_qkv_bias=text.qkv_bias,
        # Tells megatron to sum the gradients of the head norms over tensor-parallel ranks, each of which sees some heads only.
        qk_layernorm=text.qk_norm,
        pipeline_model_parallel_size=options.pipeline_parallel_size,
        sequence_parallel=options.sequence_parallel,
    )


class TextDecoder(GPTModel):
    """GPTModel's parts and names, run without its rope and without its head on every position."""

    def __init__(self, text: TextArchitecture, config: TransformerConfig, pre_process: bool = True, post_process: bool = True) -> None:
        layers = [transformer_layer_spec(qk_norm=text.qk_norm)] * get_num_layers_to_build(config)
        super().__init__(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm),
            vocab_size=text.vocab_size,
            max_sequence_length=text.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=text.tie_word_embeddings,
            position_embedding_type="none",
            scatter_embedding_sequence_parallel=False,
        )
        if post_process:
            # The head sees the positions that were picked out of the gathered states, so its input is never split over ranks.
            self.output_layer.config = copy.copy(config)
            self.output_layer.config.sequence_parallel = False
            self.output_layer.sequence_parallel = False

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, hidden]"""
        return self.embedding(input_ids=token_ids[None], position_ids=None)[:, 0]

    def forward(self, embeddings: torch.Tensor | None, layout: PackedLayout) -> torch.Tensor:
        """[T, hidden] -> [T, hidden] after the final norm; stages of a pipeline but the first read their input tensor instead."""
        hidden = None if embeddings is None else embeddings[:, None]
        if self.config.sequence_parallel and hidden is not None:
            ranks = self.config.tensor_model_parallel_size
            if hidden.shape[0] % ranks:
                raise ValueError(f"sequence parallel needs packs whose tokens ({hidden.shape[0]}) are a multiple of the ranks ({ranks})")
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
        hidden = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=LayoutParams.of({"full": layout}))
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden[:, 0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden] -> [N, vocabulary / tensor-parallel ranks], in the model's dtype."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden[:, None], weight=weight)[0][:, 0]


def pipeline_ends() -> tuple[bool, bool]:
    """Whether this rank holds the first and the last stage."""
    return parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
