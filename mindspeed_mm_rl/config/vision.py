"""Where the vision encoder runs: in the actor's first stage, or in workers of its own on the actor's devices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mindspeed_mm_rl.config.layout import divisors, listed
from mindspeed_mm_rl.config.plan import TrainPlan
from mindspeed_mm_rl.config.schema import Config

_SWITCH = "rl_config.colocate_actor_and_vit"
_OF_VISION_ALONE = {"load", "tensor_model_parallel_size", "pipeline_model_parallel_size", "use_distributed_optimizer"}
"""Keys that act in vit_config."""
_OF_SAMPLES = {"micro_batch_size", "save", "context_parallel_size", "expert_model_parallel_size", "sequence_parallel"}
"""Keys that users repeat for every role, and that say nothing of pictures. Of the rest, the actor's act on both."""


def vision_plan(config: Config, train: TrainPlan, load: str) -> TrainPlan | None:
    """The plan of the vision workers; None when the actor encodes. train: the actor's; load: vit_config.load, empty for the actor's.

    The optimizer is the actor's, so that the numbers are those of an encoder inside of it.
    """
    if not config.rl_config.colocate_actor_and_vit:
        return None
    vit = config.vit_config
    return replace(
        train,
        load=load or train.load,
        tensor_parallel_size=vit.tensor_model_parallel_size,
        pipeline_parallel_size=1,
        pipeline_layers=(),
        context_parallel_size=1,
        expert_parallel_size=1,
        expert_tensor_parallel_size=1,
        sequence_parallel=False,
        optimizer=replace(
            train.optimizer, use_distributed_optimizer=vit.use_distributed_optimizer, overlap_grad_reduce=False, overlap_param_gather=False
        ),
        logprob_gap_bound=0.0,
    )


def check_vision(config: Config, hf: Mapping[str, Any] | None, is_vision: bool) -> None:
    """What the placement of the encoder asks for. hf: config.json where it is known. Raises ValueError with the values that would do."""
    vit, colocated = config.vit_config, config.rl_config.colocate_actor_and_vit
    if colocated and not is_vision:
        raise ValueError(f"{_SWITCH} (true) needs a model with a vision encoder, which this one hasn't; set it to false")
    if colocated and vit.pipeline_model_parallel_size != 1:
        raise ValueError(
            f"vit_config.pipeline_model_parallel_size ({vit.pipeline_model_parallel_size}) must be 1: the vision workers share each layer, "
            "not the stack of layers; set vit_config.pipeline_model_parallel_size=1 and take vit_config.tensor_model_parallel_size instead"
        )
    vision, devices = (hf or {}).get("vision_config") or {}, config.rl_config.actor_resource.num_npus
    key = "vit_config.tensor_model_parallel_size" if colocated else "actor_config.tensor_model_parallel_size"
    size = (vit if colocated else config.actor_config).tensor_model_parallel_size
    if is_vision:
        _check_tensor(key, size, vision, devices if colocated else 0)


def _check_tensor(key: str, size: int, vision: Mapping[str, Any], devices: int) -> None:
    """devices: 0 where another rule compares them."""
    whole = {name: int(vision[name]) for name in ("num_heads", "intermediate_size", "hidden_size") if name in vision}
    bounds = {f"vision_config.{name} ({number}) of config.json": number for name, number in whole.items()}
    bounds |= {f"rl_config.actor_resource.num_npus ({devices})": devices} if devices else {}
    broken = [name for name, number in bounds.items() if number % size]
    if not broken:
        return
    inside = "" if devices else f", or give the encoder workers of its own ({_SWITCH}: true)"
    raise ValueError(f"{key} ({size}) must divide {' and '.join(broken)}; {listed(divisors(math.gcd(*bounds.values())))} would do{inside}")


def vision_notes(config: Config) -> list[str]:
    """Keys of vit_config in whose place the actor's act."""
    vit, actor = config.vit_config, config.actor_config
    if not config.rl_config.colocate_actor_and_vit:
        return []
    given = [key for key in vit.model_fields_set - _OF_VISION_ALONE - _OF_SAMPLES if getattr(vit, key) != getattr(actor, key)]
    told = ", ".join(f"{key} ({getattr(vit, key)})" for key in sorted(given))
    return [f"vit_config: {told} isn't used: the actor's acts on both"] if given else []
