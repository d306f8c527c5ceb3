"""config.json's sizes read off the files of ranks, for resplit as MindSpeed-MM's users call it: without a Hugging Face folder.

How many heads a row block has can't be seen. Cutting and joining again keeps the order of rows whatever the number is; it only decides
which tensor parallel sizes are refused, so the heads of the published models are taken: 128 wide, and 16 in the vision encoder.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from checkpoint.options import ParallelConfig
from mindspeed_mm_rl.models.rank_files import Ranks, read_stages, same_bits

_HEAD = 128
_VISION_HEADS = 16
_NEEDS_CONFIG = "give --cfg.hf_config.hf_dir, a folder with the model's config.json"


def config_of_ranks(ranks: Ranks, parallel: ParallelConfig) -> dict[str, Any]:
    """Of a dense model in MindSpeed-MM's joined layout. Raises ValueError when the files are of another."""
    named = {name: tensor for *_, name, tensor in ranks.names()}
    if any(".experts." in name or ".q_proj." in name or "kv_down_proj" in name for name in named):
        raise ValueError(f"{ranks.folder}: the sizes of this model can't be read off its files; {_NEEDS_CONFIG}")
    prefix = "text_decoder." if any(name.startswith("text_decoder.") for name in named) else ""
    try:
        config = _text(ranks, named, prefix, ranks.counts[0] if parallel.tp_size < 2 and not parallel.vit_tp_size else parallel.tp_size)
        if any(name.startswith("image_encoder.") for name in named):
            config |= {"model_type": "qwen2_5_vl", "vision_config": _vision(ranks, named, parallel.vit_tp_size or ranks.counts[0])}
    except KeyError as error:
        raise ValueError(f"{ranks.folder} has no {error} in its first rank; {_NEEDS_CONFIG}") from error
    return config


def _text(ranks: Ranks, named: dict[str, Tensor], prefix: str, tensor: int) -> dict[str, Any]:
    layer = f"{prefix}decoder.layers.0."
    hidden = named[f"{layer}input_layernorm.weight"].shape[0]
    # Of one rank: its heads are whole.
    query_rows = named[f"{layer}self_attention.linear_proj.weight"].shape[1]
    kv_rows = (named[f"{layer}self_attention.linear_qkv.weight"].shape[0] - query_rows) // 2
    norm = named.get(f"{layer}self_attention.q_layernorm.weight")
    head = norm.shape[0] if norm is not None else math.gcd(_HEAD, query_rows, kv_rows)
    biased = f"{layer}self_attention.linear_qkv.bias" in named
    return {
        "model_type": "qwen3" if norm is not None else "qwen2" if biased else "llama",
        "hidden_size": hidden,
        "intermediate_size": named[f"{layer}mlp.linear_fc2.weight"].shape[1] * tensor,
        "num_hidden_layers": sum(map(sum, read_stages(ranks, vision=False))),
        "num_attention_heads": query_rows // head * tensor,
        "num_key_value_heads": kv_rows // head * tensor,
        "head_dim": head,
        "vocab_size": named[f"{prefix}embedding.word_embeddings.weight"].shape[0] * tensor,
        "tie_word_embeddings": _is_tied(named, prefix),
    }


def _is_tied(named: dict[str, Tensor], prefix: str) -> bool:
    output = named.get(f"{prefix}output_layer.weight")
    return output is None or same_bits(output, named[f"{prefix}embedding.word_embeddings.weight"])


def _vision(ranks: Ranks, named: dict[str, Tensor], tensor: int) -> dict[str, Any]:
    hidden, channels, frames, patch, _ = named["image_encoder.encoder.patch_embed.proj.weight"].shape
    merged = named["image_encoder.projector.encoder.linear_fc1.weight"].shape[1]
    return {
        "depth": sum(map(sum, read_stages(ranks, vision=True))),
        "hidden_size": hidden,
        "intermediate_size": named["image_encoder.encoder.blocks.layers.0.mlp.linear_fc2.weight"].shape[1] * tensor,
        "num_heads": math.gcd(_VISION_HEADS, hidden),
        "out_hidden_size": named["image_encoder.projector.encoder.linear_fc2.weight"].shape[0],
        "spatial_merge_size": math.isqrt(merged // hidden),
        "in_channels": channels,
        "temporal_patch_size": frames,
        "patch_size": patch,
    }
