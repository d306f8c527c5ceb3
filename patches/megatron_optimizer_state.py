"""With torch's Adam, megatron's distributed optimizer can't load a checkpoint into a fresh process: state_dict() asserts that a step was
made, set-states forgets "step", and all parameters share one step tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mindspeed_mm_rl.platforms import versions
from mindspeed_mm_rl.platforms.patching import Patch

if TYPE_CHECKING:
    import torch


def _apply() -> None:
    import functools

    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    state_dict, set_states = DistributedOptimizer.state_dict, DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(state_dict)
    def seeded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        for parameter in (p for group in self.optimizer.param_groups for p in group["params"]):
            if not self.optimizer.state.get(parameter):
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
        return state_dict(self, *args, **kwargs)

    def set_states_with_step(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> Any:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors = {"step": state["step"], **tensors}
        return set_states(self, model_param, tensors)

    DistributedOptimizer.state_dict = seeded_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_with_step


PATCH = Patch(
    package="megatron-core",
    versions=">=0.12",
    process="train",
    # On NPU MindSpeed brings an Adam of its own, and replaces the optimizer's methods for it.
    devices=("cpu", "cuda"),
    changes=tuple(
        f"megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.{name}"
        for name in ("state_dict", "_set_main_param_and_optimizer_states")
    ),
    until="megatron resumes with torch.optim.AdamW",
    condition="neither Transformer Engine nor Apex, which bring another Adam, is installed",
    holds=lambda: not any(map(versions.installed, ("transformer-engine", "apex"))),
    apply=_apply,
)
