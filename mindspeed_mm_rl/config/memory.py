"""What is kept on the devices: state that leaves them between phases, and activations that are computed again instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from mindspeed_mm_rl.config.layout import divisors, listed
from mindspeed_mm_rl.config.model_file import ModelChoices, text_config
from mindspeed_mm_rl.config.plan import OffloadPart, TrainPlan
from mindspeed_mm_rl.config.schema import Config, GenerateConfig, MegatronConfig
from mindspeed_mm_rl.platforms import device, env

_OFFLOAD_KEYS: dict[OffloadPart, str] = {
    "param": "offload_train_param",
    "grad": "offload_train_grad",
    "optimizer": "offload_train_optimizer",
}


def offload_parts(generate: GenerateConfig, kind: device.Kind) -> tuple[OffloadPart, ...]:
    """The reference always leaves; on CPU, whose memory is one, nothing does."""
    return () if kind == "cpu" else ("reference", *(part for part, key in _OFFLOAD_KEYS.items() if getattr(generate, key)))


def weight_carrier(generate: GenerateConfig, kind: device.Kind, variables: Mapping[str, str]) -> Literal["host", "device"]:
    """Through the device where trained weights stay there, so that there is room for them beside the rollout engine's, and where processes
    can open each other's memory of it. variables: of every worker. Raises ValueError where what is asked for is impossible."""
    can_share = kind == "cpu" or device.can_share_memory()
    if generate.weight_carrier == "device" and not can_share:
        raise ValueError("generate_config.weight_carrier device needs ipc handles, which torch_npu has since 2.7; set it to host or auto")
    in_segments = kind != "cpu" and env.has_expandable_segments(kind, variables)
    if generate.weight_carrier == "device" and in_segments:
        raise ValueError(
            "generate_config.weight_carrier device needs memory without expandable_segments, to which not every version gives ipc handles; "
            f"set PYTORCH_{kind.upper()}_ALLOC_CONF to 'expandable_segments:False' in rl_config.runtime_env_path, or set it to host or auto"
        )
    if generate.weight_carrier != "auto":
        return generate.weight_carrier
    has_room = kind != "cpu" and not generate.offload_train_param
    return "device" if has_room and can_share and not in_segments else "host"


def recompute_fields(keys: MegatronConfig, choices: ModelChoices) -> dict[str, Any]:
    """Fields of a TrainPlan; keys of the section go before those of the model file."""
    return {
        "recompute": keys.recompute_granularity or choices.recompute,
        "recompute_method": keys.recompute_method or choices.recompute_method or "uniform",
        "recompute_num_layers": keys.recompute_num_layers or choices.recompute_num_layers or 1,
    }


def check_recompute(section: str, plan: TrainPlan, hf: Mapping[str, Any] | None) -> None:
    """Megatron reaches beyond the last layer where the last group of layers would be a smaller one. Raises ValueError."""
    if hf is None or plan.recompute != "full" or plan.recompute_method != "uniform":
        return
    layers, stages = text_config(hf)["num_hidden_layers"], plan.pipeline_parallel_size
    sizes = {size for row in plan.pipeline_layers for size in row} or {layers // stages, -(-layers // stages)}
    if broken := sorted(size for size in sizes if size % plan.recompute_num_layers):
        would_do = [number for number in divisors(broken[0]) if not any(size % number for size in sizes)]
        raise ValueError(
            f"{section}.recompute_num_layers ({plan.recompute_num_layers}) must divide the layers of every pipeline stage "
            f"({', '.join(map(str, sorted(sizes)))}) with recompute_method uniform; {listed(would_do)} would do, or recompute_method block"
        )


def memory_notes(config: Config, choices: ModelChoices) -> list[str]:
    """Keys that don't act."""
    notes, generate, actor = [], config.generate_config, config.actor_config
    asked = [key for key in _OFFLOAD_KEYS.values() if getattr(generate, key)]
    if asked and device.kind() == "cpu":
        notes.append(f"generate_config: {', '.join(asked)} isn't used: on CPU there is one memory")
    given = [key for key in ("recompute_method", "recompute_num_layers") if getattr(actor, key) is not None]
    if given and recompute_fields(actor, choices)["recompute"] != "full":
        notes.append(f"actor_config: {', '.join(given)} isn't used: it belongs to recompute_granularity full")
    return notes
