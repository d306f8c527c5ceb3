"""The footprint of a plan as text: a table of phases, and what doesn't fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.engines.footprint import Footprint, Rollout, State, footprint
from mindspeed_mm_rl.models.families import read_architecture
from mindspeed_mm_rl.platforms.memory import GIB, DeviceMemory


def memory_view(plan: Plan, device: DeviceMemory) -> list[str]:
    """Lines for the first page of a run; none where there is no config.json, which others will ask for."""
    if not (Path(plan.train.hf_path) / "config.json").is_file():
        return []
    found = footprint(plan, read_architecture(plan.train.hf_path), device.total_bytes)
    used = replace(device, per_node=min(device.per_node, plan.run.num_devices))
    return render_footprint(found, used, plan.rollout.max_model_len)


def render_footprint(found: Footprint, device: DeviceMemory, longest: int) -> list[str]:
    """longest: tokens of the longest sequence that is sampled."""
    details = {"update": _state(found.trainer.state) + f", activations {_gib(found.trainer.backward)}"}
    if found.rollout:
        details["rollout"] = _rollout(found.rollout, longest)
    lines = [
        f"Memory, estimated, of the device that has most: GiB of {_gib(device.total_bytes)} ({device.name})",
        f"  {'phase':<20} {'works':>8} {'waits':>8} {'together':>9}",
    ]
    for phase in found.phases:
        numbers = " ".join(f"{_gib(size):>{width}}" for size, width in ((phase.working, 8), (phase.waiting, 8), (phase.total, 9)))
        lines.append(f"  {phase.name:<20} {numbers}   {details.get(phase.name, '')}".rstrip())
    lines.append(f"  host memory of a machine with {device.per_node} of them: {_gib(found.on_node(device.per_node))}")
    return [*lines, *(f"warning: {problem}" for problem in problems(found, device, longest))]


def problems(found: Footprint, device: DeviceMemory, longest: int) -> Iterator[str]:
    """What is over the device's memory, with what would help; an estimate forbids nothing."""
    over = [f"{phase.name} {_gib(phase.total)}" for phase in found.phases if phase.total > device.total_bytes]
    if over:
        yield (
            f"{', '.join(over)} GiB: estimated to be over a device's {_gib(device.total_bytes)}; what helps is more devices, larger "
            "tensor, pipeline or expert parallel sizes, recompute_granularity full, a smaller rl_config.max_packing_token_size, "
            "generate_config.offload_train_* and a lower gpu_memory_utilization"
        )
    if found.rollout and found.rollout.cached_tokens < longest:
        yield (
            f"the rollout engine's weights take {_gib(found.rollout.weights)} GiB of each device, which leaves room for "
            f"{found.rollout.cached_tokens} tokens, fewer than the longest sequence ({longest}): raise "
            "generate_config.infer_tensor_parallel_size or gpu_memory_utilization"
        )


def _state(state: State) -> str:
    return f"weights {_gib(state.parameters)}, gradients {_gib(state.gradients)}, optimizer {_gib(state.optimizer)}"


def _rollout(rollout: Rollout, longest: int) -> str:
    tokens = rollout.cached_tokens
    return f"weights {_gib(rollout.weights)}, room for {tokens} tokens, {tokens // longest} longest sequences"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
