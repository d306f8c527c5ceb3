"""Configurations of published models, and training saves made without a trainer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from safetensors.torch import load_file

from checkpoint.tensor_files import Pending

LAYERS = "text_decoder.decoder.layers."

VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_chans": 3,
    "patch_size": 14,
    "temporal_patch_size": 2,
}
CONFIG_7B = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "vision_config": dict(VISION, out_hidden_size=3584),
}
CONFIG_3B = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "vision_config": dict(VISION, out_hidden_size=2048),
}


def load(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def write_mm(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """What MindSpeed-MM's converter leaves at tp 1, pp 1, by torch.save itself."""
    rank = folder / "release" / "mp_rank_00"
    rank.mkdir(parents=True)
    torch.save(
        {"model": {name: tensor.clone() for name, tensor in weights.items()}, "checkpoint_version": 3.0}, rank / "model_optim_rng.pt"
    )
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    return folder


def pending(weights: dict[str, torch.Tensor]) -> list[Pending]:
    return [Pending(name, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: [tensor]) for name, tensor in weights.items()]


def stacked(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Text layers under one key per kind, as megatron writes a block of equal layers; vision layers stay apart."""
    grouped: dict[str, list[torch.Tensor]] = {}
    for name, tensor in weights.items():
        key = LAYERS + name.removeprefix(LAYERS).split(".", 1)[1] if name.startswith(LAYERS) else name
        grouped.setdefault(key, []).append(tensor)
    return {key: torch.stack(tensors) if key.startswith(LAYERS) else tensors[0] for key, tensors in grouped.items()}


def make_training_save(folder: Path, weights: dict[str, torch.Tensor], iteration: int = 10) -> Path:
    """A save as the trainer leaves it, optimizer state and an object beside the weights."""
    iteration_folder = folder / f"iter_{iteration:07d}"
    actor = iteration_folder / "actor"
    model = {f"model.{name}": tensor for name, tensor in stacked(weights).items()}
    optimizer = {f"optimizer.state.exp_avg.{name}": torch.zeros_like(tensor) for name, tensor in model.items()}
    actor.mkdir(parents=True)
    distributed_checkpoint.save({**model, **optimizer, "rng": {"seed": 7}}, checkpoint_id=actor)
    (iteration_folder / "state.json").write_text(json.dumps({"iteration": iteration}))
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return folder
