"""One rank of a policy with experts: run by `test_expert_parallel.py` in the processes of a RankPool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mindspeed_mm_rl.config.plan import TrainPlan

LENGTHS = (5, 33, 12, 20)
TEMPERATURE = 0.7


def run(rank: int, world: int, address: str, plan: TrainPlan, reference: Path) -> tuple[dict[int, list[float]], dict[str, float]]:
    """Log-probs by row, and by weight how far this rank's gradient is off, relative to its norm, from that of one process.

    world 1: gradients are written to `reference`, by Hugging Face name; the others read there what their own should be.
    """
    from mindspeed_mm_rl.platforms import device

    device.set_threads(1)
    device.adapt_megatron()
    from mindspeed_mm_rl.engines.megatron import process_groups

    process_groups.initialize(plan, rank, world, address)
    try:
        return _forward_backward(plan, reference, is_reference=world == 1)
    finally:
        process_groups.destroy()


def save(rank: int, world: int, address: str, plan: TrainPlan, folder: Path) -> None:
    """The weights as a training save has them."""
    from mindspeed_mm_rl.platforms import device

    device.adapt_megatron()
    from mindspeed_mm_rl.engines.megatron import process_groups, saves

    process_groups.initialize(plan, rank, world, address)
    try:
        saves.save_weights(folder, [_policy(plan)[0]])
    finally:
        process_groups.destroy()


def _policy(plan: TrainPlan) -> tuple[Any, Any]:
    """With its weights, and the pieces of all weights that it has."""
    from mindspeed_mm_rl.engines.megatron import process_groups
    from mindspeed_mm_rl.models.families import read_architecture
    from mindspeed_mm_rl.models.qwen2_5_vl import build_policy
    from mindspeed_mm_rl.models.rank_pieces import chunk_pieces, grid_entries, read_pieces
    from mindspeed_mm_rl.models.weight_sources import HuggingFaceSource

    architecture = read_architecture(plan.hf_path)
    grid = process_groups.grid(plan, architecture.text.num_layers)
    pieces = chunk_pieces(grid_entries(architecture.raw, grid), grid, process_groups.grid_place())
    policy = build_policy(architecture, grid=grid, sequence_parallel=plan.sequence_parallel)
    policy.load_weights(read_pieces(HuggingFaceSource(Path(plan.hf_path), architecture.raw), pieces))
    return policy, pieces


def _forward_backward(plan: TrainPlan, reference: Path, is_reference: bool) -> tuple[dict[int, list[float]], dict[str, float]]:
    from mindspeed_mm_rl.models.rank_pieces import read_pieces
    from mindspeed_mm_rl.models.weight_layout import to_hf

    policy, pieces = _policy(plan)
    logprobs, gradients = _gradients(policy, plan)
    if is_reference:
        whole = {name: gradients.get(name, torch.zeros_like(tensor)) for name, tensor in policy.weights().items()}
        torch.save(dict(to_hf(whole, policy.architecture.raw)), reference)
    expected = read_pieces(torch.load(reference, weights_only=True), pieces)
    assert {name for name in expected if name not in gradients} == {name for name in expected if name.endswith("expert_bias")}
    return logprobs, {name: _relative(gradient, expected[name]) for name, gradient in gradients.items()}


def _gradients(policy: Any, plan: TrainPlan) -> tuple[dict[int, list[float]], dict[str, torch.Tensor]]:
    """As megatron's DDP sums them over the ranks that have other rows."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads

    from mindspeed_mm_rl.engines.megatron.optimizer import wrap_for_data_parallel
    from mindspeed_mm_rl.models.heads import token_logprobs

    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(8, 512, (length,), generator=generator) for length in LENGTHS]
    (model,) = wrap_for_data_parallel([policy], plan.optimizer)
    model.zero_grad_buffer()
    own = range(parallel_state.get_data_parallel_rank(), len(rows), parallel_state.get_data_parallel_world_size())
    tokens = torch.cat([rows[i] for i in own])
    hidden = model(tokens, policy.layout([rows[i] for i in own], [[]] * len(own)))[: len(tokens)]
    logprobs = token_logprobs(policy, hidden, tokens, TEMPERATURE)[0]
    weights = torch.cat([torch.linspace(0.1, 1.0, LENGTHS[i]) * (i + 1) for i in own])
    (logprobs * weights).sum().backward()
    finalize_model_grads([model], None)
    by_row = dict(zip(own, (part.tolist() for part in logprobs.detach().split([LENGTHS[i] for i in own])), strict=True))
    return by_row, {name: parameter.main_grad for name, parameter in policy.named_parameters() if parameter.requires_grad}


def _relative(gradient: torch.Tensor, expected: torch.Tensor) -> float:
    """0 where both are: an expert that no token went to."""
    difference = float((gradient - expected).norm())
    return difference / float(expected.norm()) if difference else 0.0
