"""Layouts that must not change a result, and the tiny models that are trained under them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindspeed_mm_rl.config.plan import TrainPlan
from tests.plans import optimizer_plan, train_plan
from tests.tiny import make_tiny_text, make_tiny_vl

LAYERS = 4


@dataclass(frozen=True)
class Model:
    family: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    """Fields of TrainPlan."""
    has_experts: bool = False

    def make(self, folder: Path) -> Path:
        sizes = {"layers": LAYERS, "hidden": 64, "intermediate": 96, **self.sizes}
        return make_tiny_vl(folder, **sizes) if self.family == "qwen2_5_vl" else make_tiny_text(folder, family=self.family, **sizes)


MODELS = {
    "Qwen2.5": Model("qwen2", {"tied": True}),
    "Qwen2.5-VL": Model("qwen2_5_vl"),
    "Qwen2.5-VL, ViT trained": Model("qwen2_5_vl", plan={"freeze_vision": False, "freeze_projector": False}),
    "Qwen3": Model("qwen3"),
    "Qwen3-MoE": Model("qwen3_moe", has_experts=True),
    "DeepSeek-V3": Model("deepseek_v3", has_experts=True),
}


@dataclass(frozen=True)
class Mode:
    """Fields of TrainPlan and OptimizerPlan that make a layout, and the processes it takes."""

    processes: int
    plan: Mapping[str, Any]
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    needs_experts: bool = False


def _mode(processes: int, **plan: Any) -> Mode:
    names = {"tp": "tensor", "pp": "pipeline", "cp": "context", "ep": "expert", "etp": "expert_tensor"}
    sizes = {f"{names[key]}_parallel_size": plan.pop(key) for key in list(plan) if key in names}
    optimizer = {
        key: plan.pop(key) for key in list(plan) if key in ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
    }
    return Mode(processes, {**sizes, **plan}, optimizer, needs_experts="ep" in names and sizes.get("expert_parallel_size", 1) > 1)


_OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
MODES = {
    "TP2": _mode(2, tp=2),
    "TP2+SP": _mode(2, tp=2, sequence_parallel=True),
    "PP2": _mode(2, pp=2),
    "PP2, 3+1 layers": _mode(2, pp=2, pipeline_layers=((3, 1),)),
    "PP2+VPP2": _mode(2, pp=2, pipeline_layers=((1, 1), (1, 1))),
    "CP2 ulysses": _mode(2, cp=2),
    "CP2 all_gather": _mode(2, cp=2, context_parallel_algorithm="all_gather"),
    "DP2": _mode(2),
    "DP2+dist.opt., overlap": _mode(2, **_OVERLAP),
    "EP2": _mode(2, ep=2),
    "EP2+dist.opt., overlap": _mode(2, ep=2, **_OVERLAP),
    "TP2xCP2 ulysses": _mode(4, tp=2, cp=2),
    "TP2+SPxCP2 all_gather": _mode(4, tp=2, cp=2, sequence_parallel=True, context_parallel_algorithm="all_gather"),
    "TP2xPP2": _mode(4, tp=2, pp=2),
    "TP2xDP2+dist.opt.": _mode(4, tp=2, use_distributed_optimizer=True),
    "TP2xEP2": _mode(4, tp=2, ep=2),
    "TP2xEP2xETP2": _mode(4, tp=2, ep=2, etp=2),
    "PP2xEP2": _mode(4, pp=2, ep=2),
    "CP2xEP2": _mode(4, cp=2, ep=2),
}


def fits(mode: str, model: str) -> bool:
    """Whether the layout makes sense for the model."""
    return MODELS[model].has_experts or not MODES[mode].needs_experts


def plan_for(model: str, folder: Path, mode: str | None) -> TrainPlan:
    """mode None: one process. With experts the sizes that have rules follow them (config/layout_rules.py)."""
    chosen, layout = MODELS[model], MODES[mode] if mode else Mode(1, {})
    fields = {**chosen.plan, **layout.plan}
    if chosen.has_experts and (tensor := fields.get("tensor_parallel_size", 1)) > 1:
        fields["sequence_parallel"] = True
        if not layout.needs_experts:
            fields["expert_tensor_parallel_size"] = tensor
    optimizer = optimizer_plan(adam_eps=1e-6, weight_decay=0.01, **layout.optimizer)
    return train_plan(folder, max_samples_per_micro_batch=2, optimizer=optimizer, timeout_seconds=60.0, **fields)
