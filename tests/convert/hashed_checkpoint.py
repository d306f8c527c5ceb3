"""Tiny Hugging Face checkpoints whose values follow from the weights' names alone: the same bytes with every version of every library."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

_FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def hashed(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values k / 128 with k from -128 to 127, exact in bfloat16 and float32, from the SHAKE-256 stream of `name`."""
    stream = bytearray(hashlib.shake_256(name.encode()).digest(math.prod(shape)))
    return (torch.frombuffer(stream, dtype=torch.int8).to(torch.float32) / 128).reshape(shape).to(dtype)


def digest(tensor: Tensor) -> str:
    """Sixteen hexadecimal digits of the sha256 of a tensor's bytes in row-major order."""
    return hashlib.sha256(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def described(tensor: Tensor) -> str:
    """Example: 'bfloat16 96x64 0123456789abcdef'."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape))} {digest(tensor)}"


def qwen2_5(tied: bool, **changed: Any) -> dict[str, Any]:
    """config.json of a tiny Qwen2.5; tensor parallel sizes up to 4 divide everything."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 112,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16" if tied else "float32",
        **changed,
    }


def qwen2_5_vl(tied: bool, **vision: int) -> dict[str, Any]:
    """config.json of a tiny Qwen2.5-VL as the published ones have it, text keys at the top; `vision` changes its vision_config."""
    return {
        **qwen2_5(tied),
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "image_token_id": 107,
        "video_token_id": 108,
        "vision_start_token_id": 105,
        "vision_end_token_id": 106,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_heads": 4,
            "out_hidden_size": 64,
            "in_chans": 3,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "hidden_act": "silu",
            **vision,
        },
    }


def shapes(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a published checkpoint of this config.json, written down apart from the converter's own table."""
    vision = _vision_shapes(config["vision_config"]) if "vision_config" in config else {}
    return vision | _text_shapes(config)


def make_checkpoint(folder: Path, config: Mapping[str, Any], named: Shapes | None = None) -> Path:
    """A Hugging Face folder of two weight files with an index; the dtype is the config's torch_dtype, the weights are `named` or dense."""
    folder.mkdir(parents=True)
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[config["torch_dtype"]]
    weights = {name: hashed(name, shape, dtype) for name, shape in (named or shapes(config)).items()}
    names = sorted(weights)
    parts = dict(zip(_FILES, (names[::2], names[1::2]), strict=True))
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def _text_shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    found: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            found |= {f"{layer}self_attn.{name}_proj.weight": (rows, hidden), f"{layer}self_attn.{name}_proj.bias": (rows,)}
        found[f"{layer}self_attn.o_proj.weight"] = (hidden, hidden)
        found |= {f"{layer}mlp.gate_proj.weight": (ffn, hidden), f"{layer}mlp.up_proj.weight": (ffn, hidden)}
        found[f"{layer}mlp.down_proj.weight"] = (hidden, ffn)
        found |= {f"{layer}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    return found if config["tie_word_embeddings"] else found | {"lm_head.weight": (vocab, hidden)}


def _vision_shapes(vision: Mapping[str, Any]) -> Shapes:
    hidden, ffn, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    merged = hidden * vision["spatial_merge_size"] ** 2
    found: Shapes = {"visual.patch_embed.proj.weight": (hidden, vision["in_chans"], vision["temporal_patch_size"], patch, patch)}
    linear = {"attn.qkv": (3 * hidden, hidden), "attn.proj": (hidden, hidden), "mlp.down_proj": (hidden, ffn)}
    linear |= {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden)}
    for n in range(vision["depth"]):
        block = f"visual.blocks.{n}."
        found |= {f"{block}{norm}.weight": (hidden,) for norm in ("norm1", "norm2")}
        found |= {f"{block}{name}.weight": shape for name, shape in linear.items()}
        found |= {f"{block}{name}.bias": shape[:1] for name, shape in linear.items()}
    out = vision["out_hidden_size"]
    found |= {"visual.merger.ln_q.weight": (hidden,), "visual.merger.mlp.0.weight": (merged, merged), "visual.merger.mlp.0.bias": (merged,)}
    return found | {"visual.merger.mlp.2.weight": (out, merged), "visual.merger.mlp.2.bias": (out,)}
