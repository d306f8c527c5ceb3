"""The text decoder: the shape of Llama and Qwen on megatron's GPTModel, from token embeddings to the states before the head."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default

from mindspeed_mm_rl.models.attention import LayoutParams, PackedLayout, self_attention_spec, transformer_layer_spec
from mindspeed_mm_rl.models.context_parallel import Algorithm, pack_multiple
from mindspeed_mm_rl.models.experts import check_expert_split, expert_layer_spec, expert_settings
from mindspeed_mm_rl.models.families import TextArchitecture
from mindspeed_mm_rl.models.latent_attention import latent_attention_spec
from mindspeed_mm_rl.models.mlp import mlp_spec
from mindspeed_mm_rl.models.norm import RMSNorm
from mindspeed_mm_rl.models.rank_pieces import Grid
from mindspeed_mm_rl.platforms.compat import supported_arguments


@dataclass(frozen=True)
class ModelOptions:
    """How a model is laid out and run, whatever its architecture. Example: ModelOptions(dtype=torch.bfloat16)."""

    dtype: torch.dtype = torch.float32
    recompute: Literal["full", "selective"] | None = None
    """What is run again in the backward pass: layers, of which only the input is kept, or only the attention within them."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Of full, in the text decoder: all layers in groups of recompute_num_layers, or the first so many of a stage one by one."""
    recompute_num_layers: int = 1
    deterministic: bool = False
    grid: Grid | None = None
    """None: one process has the whole network."""
    context_parallel_size: int = 1
    context_parallel_algorithm: Algorithm = "ulysses"
    sequence_parallel: bool = False

    @property
    def tensor_parallel_size(self) -> int:
        return self.grid.tensor if self.grid else 1

    @property
    def pack_multiple(self) -> int:
        """What the tokens of a pack must be a multiple of."""
        share = pack_multiple(self.context_parallel_size, self.context_parallel_algorithm) if self.context_parallel_size > 1 else 1
        return share * (self.tensor_parallel_size if self.sequence_parallel else 1)


@dataclass(frozen=True)
class Stage:
    """The part of the text decoder that one network of a process holds. Example: Stage(range(14), is_first=True, is_last=False)."""

    layers: range
    """Numbers over the whole model."""
    is_first: bool
    """With the embedding, and the vision encoder."""
    is_last: bool
    """With the final norm and the head."""
    virtual: int = 0

    @staticmethod
    def of(grid: Grid, pipeline: int, virtual: int) -> Stage:
        is_first = pipeline == 0 and virtual == 0
        is_last = pipeline == grid.pipeline - 1 and virtual == grid.virtual - 1
        return Stage(grid.layer_numbers(pipeline, virtual), is_first, is_last, virtual)


def transformer_config(options: ModelOptions, **shape: Any) -> TransformerConfig:
    """What the text decoder and the vision encoder share. Fused kernels are off: they need CUDA extensions."""
    if options.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype {options.dtype} is not offered; float32 and bfloat16 are")
    recompute = {"recompute_granularity": options.recompute}
    if options.recompute == "full":
        recompute |= {"recompute_method": "uniform", "recompute_num_layers": 1}
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
    }
    return TransformerConfig(**supported_arguments(TransformerConfig, arguments | recompute | shape))


def text_config(text: TextArchitecture, options: ModelOptions) -> TransformerConfig:
    """Raises ValueError for a grid that the model's experts can't be spread over."""
    grid = options.grid or Grid(stages=((text.num_layers,),))
    check_expert_split(text.experts, grid.tensor, grid.expert, grid.expert_tensor, options.sequence_parallel)
    return transformer_config(
        options,
        num_layers=text.num_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_attention_heads=text.num_heads,
        num_query_groups=text.num_kv_heads,
        kv_channels=text.latent.qk_head_dim if text.latent else text.head_dim,
        layernorm_epsilon=text.rms_norm_eps,
        add_bias_linear=False,
        add_qkv_bias=text.qkv_bias,
        # Tells megatron to sum the gradients of the head norms over tensor-parallel ranks, each of which sees some heads only.
        qk_layernorm=text.qk_norm,
        sequence_parallel=options.sequence_parallel,
        **(expert_settings(text.experts) if text.experts else {}),
        **_recomputed(options),
        **(_grid_config(options.grid, options.context_parallel_size) if options.grid else {}),
    )


def _recomputed(options: ModelOptions) -> dict[str, Any]:
    if options.recompute != "full":
        return {}
    return {"recompute_method": options.recompute_method, "recompute_num_layers": options.recompute_num_layers}


def _grid_config(grid: Grid, context_parallel_size: int) -> dict[str, Any]:
    sizes = {"pipeline_model_parallel_size": grid.pipeline, "context_parallel_size": context_parallel_size}
    # Always given: with one expert rank megatron would leave gradients of uncut experts unsummed over tensor ranks.
    sizes |= {"expert_model_parallel_size": grid.expert, "expert_tensor_parallel_size": grid.expert_tensor}
    if grid.virtual == 1:
        return sizes
    # Batched sends pair up the wrong messages when two stages of one rank talk to the same neighbour.
    return sizes | {"virtual_pipeline_model_parallel_size": grid.virtual, "overlap_p2p_comm": True, "batch_p2p_comm": False}


class DecoderLayers(TransformerBlock):
    """The layers of one stage; which they are is ours to say, megatron deals them evenly."""

    def __init__(self, text: TextArchitecture, config: TransformerConfig, options: ModelOptions, stage: Stage) -> None:
        alone = copy.copy(config)
        alone.pipeline_model_parallel_size, alone.virtual_pipeline_model_parallel_size = 1, None
        specs = layer_specs(text, options, stage.layers)
        super().__init__(
            config=alone,
            spec=TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm),
            pre_process=stage.is_first,
            post_process=stage.is_last,
        )
        self.numbers = stage.layers

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """One entry per layer, under its number in the whole model."""
        state: dict[str, Any] = {}
        for local, (number, layer) in enumerate(zip(self.numbers, self.layers, strict=True)):
            own = layer.sharded_state_dict(f"{prefix}layers.{local}.", (), metadata)
            replace_prefix_for_sharding(own, f"{prefix}layers.{local}.", f"{prefix}layers.{number}.")
            state |= own
        if self.final_layernorm is not None:
            # 0.16 takes every tensor-parallel rank for the first one unless it is told the group.
            told = supported_arguments(sharded_state_dict_default, {"tp_group": parallel_state.get_tensor_model_parallel_group()})
            state |= sharded_state_dict_default(self.final_layernorm, f"{prefix}final_layernorm.", (), metadata, **told)
        return state


def layer_specs(text: TextArchitecture, options: ModelOptions, layer_numbers: Sequence[int]) -> list[ModuleSpec]:
    """Of the layers with these numbers over the whole model."""
    attention = latent_attention_spec(text.latent) if text.latent else self_attention_spec(qk_norm=text.qk_norm)
    dense, sparse = mlp_spec(), expert_layer_spec(text.experts) if text.experts else None
    with_experts = text.experts.layers if text.experts else ()
    return [transformer_layer_spec(attention, sparse if number in with_experts else dense) for number in layer_numbers]


class TextDecoder(GPTModel):
    """GPTModel's parts and names, run without its rope and without its head on every position."""

    def __init__(self, text: TextArchitecture, config: TransformerConfig, options: ModelOptions, stage: Stage) -> None:
        super().__init__(
            config=config,
            # Its own layers are replaced below.
            transformer_layer_spec=TransformerBlockSubmodules(layer_specs=[], layer_norm=RMSNorm),
            vocab_size=text.vocab_size,
            max_sequence_length=text.max_position_embeddings,
            pre_process=stage.is_first,
            post_process=stage.is_last,
            share_embeddings_and_output_weights=text.tie_word_embeddings,
            position_embedding_type="none",
            scatter_embedding_sequence_parallel=False,
            **supported_arguments(GPTModel.__init__, {"vp_stage": stage.virtual if config.virtual_pipeline_model_parallel_size else None}),
        )
        self.decoder = DecoderLayers(text, config, options, stage)
        if stage.is_last:
            # The head sees the positions that were picked out of the gathered states, so its input is never split over ranks.
            self.output_layer.config = copy.copy(config)
            self.output_layer.config.sequence_parallel = False
            self.output_layer.sequence_parallel = False

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, hidden]"""
        return self.embedding(input_ids=token_ids[None], position_ids=None)[:, 0]

    def forward(self, embeddings: torch.Tensor | None, layout: PackedLayout) -> torch.Tensor:
        """[T, hidden] -> [T, hidden] after the final norm; stages of a pipeline but the first read their input tensor instead.

        T must be a multiple of the tensor-parallel ranks under sequence parallelism (ModelOptions.pack_multiple).
        """
        hidden = None if embeddings is None else embeddings[:, None]
        if self.config.sequence_parallel and hidden is not None:
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
