"""A tiny random model of every family, written by transformers, with sizes that 4 tensor ranks, 4 expert ranks and 4 stages divide."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

import mindspeed_mm_rl  # noqa: F401  transformers' vision models import torchvision, which the package makes importable on CPU

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
VISION = {"depth": 4, "hidden_size": 32, "intermediate_size": 24, "num_heads": 4, "out_hidden_size": 32, "patch_size": 4, "window_size": 16}


def _vl(tied: bool) -> transformers.PreTrainedModel:
    rope = {"rope_theta": 1e4, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 0]}}
    config = transformers.Qwen2_5_VLConfig(text_config={**TEXT, **rope}, vision_config=VISION, tie_word_embeddings=tied)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _dense(name: str, tied: bool, **more: Any) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**TEXT, tie_word_embeddings=tied, **more)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def _qwen3_moe(tied: bool) -> transformers.PreTrainedModel:
    return _dense("Qwen3Moe", tied, head_dim=8, num_experts=8, mlp_only_layers=[1], **EXPERTS)


def _deepseek(tied: bool, q_lora_rank: int | None = 12) -> transformers.PreTrainedModel:
    latent = {"q_lora_rank": q_lora_rank, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6}
    sizes = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
    config = transformers.DeepseekV3Config(**{**TEXT, "num_key_value_heads": 8}, **latent, **sizes, **EXPERTS, tie_word_embeddings=tied)
    return transformers.DeepseekV3ForCausalLM(config)


@dataclass(frozen=True)
class Family:
    build: Callable[[bool], transformers.PreTrainedModel]
    vision: bool = False
    experts: bool = False


FAMILIES = {
    "qwen2_5_vl": Family(_vl, vision=True),
    "qwen2": Family(lambda tied: _dense("Qwen2", tied)),
    "qwen3": Family(lambda tied: _dense("Qwen3", tied, head_dim=8)),
    "llama": Family(lambda tied: _dense("Llama", tied)),
    "qwen3_moe": Family(_qwen3_moe, experts=True),
    "deepseek_v3": Family(_deepseek, experts=True),
    "deepseek_v3_plain_query": Family(lambda tied: _deepseek(tied, None), experts=True),
}


def write_model(folder: Path, family: str, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """The model as transformers saves it; every number is random, so that a name mixed up with another is seen."""
    torch.manual_seed(seed)
    model = FAMILIES[family].build(tied)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.normal_()
    model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a Hugging Face folder, however many files it has."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def rename(folder: Path, renamed: Callable[[str], str]) -> None:
    save_file({renamed(name): tensor for name, tensor in weights(folder).items()}, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path, parts: int) -> None:
    """Several files with an index instead of one."""
    found = weights(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(found)
    files = {f"model-{part + 1:05d}-of-{parts:05d}.safetensors": names[part::parts] for part in range(parts)}
    for file, own in files.items():
        save_file({name: found[name] for name in own}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in files.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left)
