"""Layouts that must not change a result, and the tiny models that are trained under them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindspeed_mm_rl.config.plan import TrainPlan
from tests.plans import optimizer_plan, train_plan
from tests.tiny import make_tiny_text, make_tiny_vl

_NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Model:
    family: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    """Fields of TrainPlan."""
    has_experts: bool = False
    is_critic: bool = False

    def make(self, folder: Path) -> Path:
        """Four layers: two virtual stages on two pipeline ranks need as many."""
        sizes = {"layers": 4, "hidden": 64, "intermediate": 96, **self.sizes}
        return make_tiny_vl(folder, **sizes) if self.family == "qwen2_5_vl" else make_tiny_text(folder, family=self.family, **sizes)


MODELS = {
    "Qwen2.5": Model("qwen2", sizes={"tied": True}),
    "Qwen2.5, critic": Model("qwen2", sizes={"tied": True}, is_critic=True),
    "Qwen2.5-VL": Model("qwen2_5_vl"),
    "Qwen2.5-VL, ViT trained": Model("qwen2_5_vl", plan={"freeze_vision": False, "freeze_projector": False}),
    "Qwen3": Model("qwen3"),
    "Qwen3-MoE": Model("qwen3_moe", has_experts=True),
    "DeepSeek-V3": Model("deepseek_v3", has_experts=True),
}


@dataclass(frozen=True)
class Mode:
    """A layout: fields of TrainPlan and OptimizerPlan, and the processes it takes."""

    processes: int
    plan: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    needs_experts: bool


_SIZES = {"tp": "tensor", "pp": "pipeline", "cp": "context", "ep": "expert", "etp": "expert_tensor"}
_DISTRIBUTED = {"use_distributed_optimizer": True}
_OVERLAP = _DISTRIBUTED | {"overlap_grad_reduce": True, "overlap_param_gather": True}


def _mode(processes: int, optimizer: Mapping[str, Any] = _NOTHING, **plan: Any) -> Mode:
    sizes = {f"{_SIZES[key]}_parallel_size": value for key, value in plan.items() if key in _SIZES}
    others = {key: value for key, value in plan.items() if key not in _SIZES}
    return Mode(processes, sizes | others, optimizer, needs_experts="ep" in plan)


ONE_PROCESS = _mode(1)
MODES = {
    "TP2": _mode(2, tp=2),
    "TP2+SP": _mode(2, tp=2, sequence_parallel=True),
    "PP2": _mode(2, pp=2),
    "PP2 of 3+1 layers": _mode(2, pp=2, pipeline_layers=((3, 1),)),
    "PP2+VPP2": _mode(2, pp=2, pipeline_layers=((1, 1), (1, 1))),
    "CP2 ulysses": _mode(2, cp=2),
    "CP2 all_gather": _mode(2, cp=2, context_parallel_algorithm="all_gather"),
    "TP2xCP2 ulysses": _mode(4, tp=2, cp=2),
    "TP2+SPxCP2 all_gather": _mode(4, tp=2, cp=2, sequence_parallel=True, context_parallel_algorithm="all_gather"),
    "DP2": _mode(2),
    "DP2+dist.opt.+overlap": _mode(2, _OVERLAP),
    "TP2xDP2+dist.opt.": _mode(4, _DISTRIBUTED, tp=2),
    "TP2xPP2": _mode(4, tp=2, pp=2),
    "PP2xDP2+dist.opt.+overlap": _mode(4, _OVERLAP, pp=2),
    "PP2+VPP2xDP2+dist.opt.+overlap": _mode(4, _OVERLAP, pp=2, pipeline_layers=((1, 1), (1, 1))),
    "EP2": _mode(2, ep=2),
    "EP2xDP2+dist.opt.+overlap": _mode(4, _OVERLAP, ep=2),
    "TP2xEP2": _mode(4, tp=2, ep=2),
    "TP2xEP2, ETP2": _mode(4, tp=2, ep=2, etp=2),
    "PP2xEP2": _mode(4, pp=2, ep=2),
    "CP2xEP2": _mode(4, cp=2, ep=2),
}


def cells() -> list[tuple[str, str]]:
    """(model, mode) that make sense together, model by model."""
    return [(model, mode) for model in MODELS for mode in MODES if MODELS[model].has_experts or not MODES[mode].needs_experts]


def plan_for(model: Model, mode: Mode, folder: Path) -> TrainPlan:
    fields = {**model.plan, **mode.plan}
    if model.has_experts and (tensor := fields.get("tensor_parallel_size", 1)) > 1:
        # As config/layout_rules.py asks.
        fields["sequence_parallel"] = True
        fields |= {} if mode.needs_experts else {"expert_tensor_parallel_size": tensor}
    # Adam's first steps are lr * sign(gradient) where eps is nothing: noise in a gradient of 0 would become a step of full size.
    optimizer = optimizer_plan(adam_eps=1e-6, weight_decay=0.01, **mode.optimizer)
    return train_plan(folder, max_samples_per_micro_batch=2, optimizer=optimizer, timeout_seconds=60.0, **fields)
