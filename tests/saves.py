"""Training saves made without a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint

from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.data.loader import PromptLoader
from mindspeed_mm_rl.models.saved_weights import VISION_FOLDER
from mindspeed_mm_rl.models.value_weights import read_value_weights
from mindspeed_mm_rl.models.weight_files import CRITIC_FOLDER, read_config, read_megatron_weights
from mindspeed_mm_rl.trainer.save_folder import ACTOR_FOLDER, SaveFolder, write_state

_VISION = "image_encoder."
WRITTEN = 1_700_000_000.0


def contents(plan: Plan, iteration: int, /, **changes: Any) -> dict[str, Any]:
    """state.json of a run that draws prompts_per_generation prompts in each iteration; a later iteration is written later."""
    loader = PromptLoader(plan.data)
    data = loader.state() | {"rows": iteration * plan.run.prompts_per_generation, "prompts": iteration * plan.run.prompts_per_generation}
    loader.close()
    state = {"iteration": iteration, "written": WRITTEN + iteration, "data": data, "kl_controller": {"coef": 0.01}, "reference": None}
    return state | changes


def make_saves(plan: Plan, /, *iterations: int, **changes: Any) -> SaveFolder:
    """Whole saves in plan.run.save, with the weights that the plan's networks begin with; `changes` are keys of state.json."""
    saves, config = SaveFolder(Path(plan.run.save)), read_config(plan.train.hf_path)
    weights = {ACTOR_FOLDER: _held(read_megatron_weights(plan.train.load, config), plan.train.with_vision)}
    if plan.critic is not None:
        weights[CRITIC_FOLDER] = _held(read_value_weights(plan.critic.load, config), plan.critic.with_vision)
    if plan.vision is not None:
        whole = read_megatron_weights(plan.vision.load, config)
        weights[VISION_FOLDER] = {name: tensor for name, tensor in whole.items() if name.startswith(_VISION)}
    for iteration in iterations:
        with saves.new_save(iteration, weights) as folder:
            for name, tensors in weights.items():
                write_weights(folder / name, tensors)
            write_state(folder, contents(plan, iteration, **changes))
    return saves


def _held(weights: Mapping[str, torch.Tensor], with_vision: bool) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights.items() if with_vision or not name.startswith(_VISION)}


def write_weights(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    distributed_checkpoint.save({f"model.{name}": tensor for name, tensor in weights.items()}, checkpoint_id=folder)
