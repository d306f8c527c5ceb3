"""Which layouts fit the devices and the model. Each rule raises ValueError with the keys, both values, and values that would do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mindspeed_mm_rl.config.layout import divisors, listed
from mindspeed_mm_rl.config.model_file import text_config
from mindspeed_mm_rl.config.plan import RolloutPlan, TrainPlan

_DEVICES = "rl_config.actor_resource.num_npus"


def num_experts(text: Mapping[str, Any]) -> int:
    """Of the text part of a config.json; 0 = a dense model."""
    return next((text[key] for key in ("num_experts", "n_routed_experts", "num_local_experts") if text.get(key)), 0)


def check_layout(section: str, plan: TrainPlan, devices: int, hf: Mapping[str, Any] | None) -> None:
    """section: the role's, for the names of keys. hf: config.json where it is known."""
    _check_devices(section, plan, devices)
    _check_switches(section, plan)
    _check_expert_groups(section, plan, devices)
    if hf is not None:
        text = text_config(hf)
        _check_tensor(section, plan, text)
        _check_experts(section, plan, devices, text)
        _check_context(section, plan, text)


def _check_devices(section: str, plan: TrainPlan, devices: int) -> None:
    sizes = (plan.tensor_parallel_size, plan.pipeline_parallel_size, plan.context_parallel_size)
    ranks = math.prod(sizes)
    if devices % ranks:
        raise ValueError(
            f"{_DEVICES} ({devices}) must be a multiple of {section}'s tensor x pipeline x context parallel sizes "
            f"({' x '.join(map(str, sizes))} = {ranks}); num_npus {listed(_multiples(ranks, devices))} would do, or sizes whose product is "
            f"{listed(divisors(devices))}"
        )


def _multiples(of: int, near: int) -> list[int]:
    below = near // of * of
    return [number for number in (below, below + of) if number]


def _check_switches(section: str, plan: TrainPlan) -> None:
    if plan.sequence_parallel and plan.tensor_parallel_size == 1:
        raise ValueError(
            f"{section}.sequence_parallel (true) needs {section}.tensor_model_parallel_size > 1, which is 1; set sequence_parallel to false"
        )
    if plan.optimizer.overlap_param_gather and not plan.optimizer.use_distributed_optimizer:
        raise ValueError(
            f"{section}.overlap_param_gather (true) needs {section}.use_distributed_optimizer (true), which is false: without it every "
            "process has all parameters already; set one to the other"
        )


def _check_expert_groups(section: str, plan: TrainPlan, devices: int) -> None:
    """Experts are spread over the processes of one pipeline stage, whatever these share of everything else."""
    stage, expert, of_each = devices // plan.pipeline_parallel_size, plan.expert_parallel_size, plan.expert_tensor_parallel_size
    if expert > 1 and stage % (expert * of_each):
        would_do = [size for size in divisors(stage) if not stage % (size * of_each)]
        raise ValueError(
            f"{_expert_key(section, plan)} x {section}.expert_tensor_parallel_size ({of_each}) = {expert * of_each} must divide the "
            f"{stage} processes of a pipeline stage ({_DEVICES} {devices} / pipeline_model_parallel_size {plan.pipeline_parallel_size}); "
            f"{listed(would_do) if would_do else f'expert_tensor_parallel_size {listed(divisors(stage))}'} would do"
        )


def _expert_key(section: str, plan: TrainPlan) -> str:
    return f"{section}.expert_model_parallel_size ({plan.expert_parallel_size})"


def _check_tensor(section: str, plan: TrainPlan, text: Mapping[str, Any]) -> None:
    """Heads, vocabulary and MLP are cut into as many equal parts."""
    size, bounds = plan.tensor_parallel_size, _tensor_bounds(text)
    broken = [f"{name} ({number})" for name, number in bounds.items() if number % size]
    if broken:
        raise ValueError(
            f"{section}.tensor_model_parallel_size ({size}) must divide {' and '.join(broken)} of {plan.hf_path}/config.json; "
            f"{listed(divisors(math.gcd(*bounds.values())))} would do"
        )


def _tensor_bounds(text: Mapping[str, Any]) -> dict[str, int]:
    """What tensor parallel cuts, by its name in config.json."""
    experts, of_expert = num_experts(text), text.get("moe_intermediate_size") or 0
    names = ["num_attention_heads", "vocab_size"]
    # Latent attention makes keys and values for every head out of one small vector.
    names += ["num_key_value_heads"] if not text.get("kv_lora_rank") else []
    names += ["intermediate_size"] if not experts or text.get("first_k_dense_replace") or text.get("mlp_only_layers") else []
    shared = {"n_shared_experts x moe_intermediate_size": (text.get("n_shared_experts") or 0) * of_expert}
    bounds = {name: text.get(name) for name in names} | shared
    return {name: number for name, number in bounds.items() if number}


def _check_experts(section: str, plan: TrainPlan, devices: int, text: Mapping[str, Any]) -> None:
    experts, size, of_each = num_experts(text), plan.expert_parallel_size, plan.expert_tensor_parallel_size
    if size > 1 and not experts:
        raise ValueError(
            f"{_expert_key(section, plan)} needs a mixture of experts, which {plan.hf_path}/config.json isn't; set it to 1 (and "
            "moe_tp_extend_ep to false)"
        )
    if not experts:
        return
    if experts % size:
        stage = devices // plan.pipeline_parallel_size
        raise ValueError(
            f"{_expert_key(section, plan)} must divide the {experts} experts of {plan.hf_path}/config.json; "
            f"{listed([n for n in divisors(experts) if not stage % (n * of_each)] or [1])} would do"
        )
    width = text.get("moe_intermediate_size") or 0
    if width % of_each:
        raise ValueError(
            f"{section}.expert_tensor_parallel_size ({of_each}{'' if size > 1 else ', as tensor_model_parallel_size'}) must divide "
            f"moe_intermediate_size ({width}) of {plan.hf_path}/config.json; {listed(divisors(width))} would do"
        )
    if plan.tensor_parallel_size > 1 and not plan.sequence_parallel:
        raise ValueError(
            f"{section}.sequence_parallel (false) must be true for a mixture of experts with {section}.tensor_model_parallel_size "
            f"({plan.tensor_parallel_size}) > 1, as every process would route every token otherwise; set it to true"
        )


def _check_context(section: str, plan: TrainPlan, text: Mapping[str, Any]) -> None:
    """Ulysses hands each process some of the heads that tensor parallel left it, for all tokens; too few key/value heads are repeated."""
    size, tensor = plan.context_parallel_size, plan.tensor_parallel_size
    if size == 1 or plan.context_parallel_algorithm != "ulysses":
        return
    heads = text["num_attention_heads"] // tensor
    kv_heads = heads if text.get("kv_lora_rank") else (text.get("num_key_value_heads") or text["num_attention_heads"]) // tensor
    would_do = [n for n in divisors(heads) if not kv_heads % n or not n % kv_heads]
    if size not in would_do:
        raise ValueError(
            f"{section}.context_parallel_size ({size}) must divide num_attention_heads / tensor_model_parallel_size "
            f"({text['num_attention_heads']} / {tensor} = {heads}), and divide or be a multiple of the key/value heads left ({kv_heads}), "
            f"with ulysses_cp_algo; {listed(would_do)} would do, or any size with {section}.context_parallel_algo megatron_cp_algo"
        )


def check_rollout_layout(plan: RolloutPlan, hf: Mapping[str, Any]) -> None:
    """The rollout engine pads the vocabulary, and repeats key/value heads of which it has too few."""
    size, text = plan.tensor_parallel_size, text_config(hf)
    bounds = {name: number for name, number in _tensor_bounds(text).items() if name not in ("vocab_size", "num_key_value_heads")}
    _check_rollout_experts(plan, num_experts(text))
    if num_experts(text) and not plan.expert_parallel:
        bounds["moe_intermediate_size"] = text["moe_intermediate_size"]
    if "vision_config" in hf and not plan.image_embeds:
        bounds |= {f"vision_config's {name}": hf["vision_config"][name] for name in ("num_heads", "intermediate_size")}
    kv_heads = text.get("num_key_value_heads") or size
    broken = [f"{name} ({number})" for name, number in bounds.items() if number % size]
    if kv_heads % size and size % kv_heads:
        broken.append(f"num_key_value_heads ({kv_heads}; or be a multiple of it)")
    if broken:
        would_do = [n for n in divisors(math.gcd(*bounds.values())) if not kv_heads % n or not n % kv_heads]
        raise ValueError(
            f"generate_config.infer_tensor_parallel_size ({size}) must divide {' and '.join(broken)} of {plan.hf_path}/config.json; "
            f"{listed(would_do)} would do"
        )


def _check_rollout_experts(plan: RolloutPlan, experts: int) -> None:
    """experts: of the model; 0 = a dense one."""
    if plan.expert_parallel and not experts:
        raise ValueError(
            f"generate_config.enable_expert_parallel (true) needs a mixture of experts, which {plan.hf_path}/config.json isn't; set it to "
            "false"
        )
    if plan.expert_parallel and experts % plan.num_ranks:
        raise ValueError(
            f"generate_config.infer_tensor_parallel_size ({plan.tensor_parallel_size}) x generate_config.infer_expert_parallel_size "
            f"({plan.data_parallel_size}) = {plan.num_ranks} must divide the {experts} experts of {plan.hf_path}/config.json while "
            f"generate_config.enable_expert_parallel is true; a product of {listed(divisors(experts))} would do"
        )
