"""One rank of a tensor-parallel policy: run by `test_tensor_parallel.py` in processes of its own."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

TEXT = [9, 10, 11, 12]


def run(rank: int, world: int, sequence_parallel: bool, model: Path, folder: Path) -> None:
    """Saves the weights (one rank) or loads them (more), then log-probs, entropy and all gradients of one loss to folder/WORLD.pt."""
    from mindspeed_mm_rl.platforms import device

    device.adapt_megatron()
    device.set_threads(1)
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from mindspeed_mm_rl.models.families import read_architecture
    from mindspeed_mm_rl.models.qwen2_5_vl import build_policy
    from mindspeed_mm_rl.models.rank_pieces import Grid

    store = dist.FileStore(str(folder / f"store_{world}_{sequence_parallel}"), world)
    dist.init_process_group(device.collective_backend(), store=store, rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    model_parallel_cuda_manual_seed(1)
    architecture = read_architecture(model)
    options = {"grid": Grid(((architecture.text.num_layers,),), tensor=world), "sequence_parallel": sequence_parallel}
    policy = build_policy(architecture, freeze_vision=False, freeze_projector=False, **options)
    weights = folder / "weights"
    if world == 1:
        weights.mkdir()
        dist_checkpointing.save(policy.sharded_state_dict(), str(weights))
    else:
        policy.load_state_dict(dist_checkpointing.load(policy.sharded_state_dict(), str(weights)))
    values = loss_backward(policy)
    gradients = {name: whole_gradient(name, parameter, world) for name, parameter in policy.named_parameters()}
    if rank == 0:
        torch.save((values, gradients), folder / f"{world}_{sequence_parallel}.pt")
    dist.destroy_process_group()


def loss_backward(policy) -> torch.Tensor:
    from mindspeed_mm_rl.models.heads import token_logprobs

    architecture = policy.architecture
    picture = [architecture.image_token_id] * 30
    row = [9, architecture.vision_start_token_id, *picture, architecture.vision_end_token_id, 20, 21, 22]
    tokens = torch.tensor(row + TEXT)
    pixels = torch.randn(120, architecture.vision.patch_values, generator=torch.Generator().manual_seed(0))
    layout = policy.layout([row, TEXT], [[(1, 12, 10)], []])
    hidden = policy(tokens, layout, policy.encode_images(pixels, [(1, 12, 10)]))
    targets = tokens.roll(-1).clamp(min=9)
    logprobs, entropy = token_logprobs(policy, hidden, targets, 0.7, architecture.banned_token_ids, True, chunk_tokens=7)
    (logprobs * torch.linspace(0.1, 1, len(tokens))).sum().add(entropy.sum()).backward()
    return torch.stack([logprobs.detach(), entropy.detach()])


def whole_gradient(name: str, parameter: torch.nn.Parameter, world: int) -> torch.Tensor:
    gradient = parameter.grad.clone()
    if world == 1:
        return gradient
    if getattr(parameter, "sequence_parallel", False):
        dist.all_reduce(gradient)
    if not getattr(parameter, "tensor_model_parallel", False):
        return gradient
    parts = [torch.empty_like(gradient) for _ in range(world)]
    dist.all_gather(parts, gradient.contiguous())
    if "linear_fc1" in name and "projector" not in name:
        # Each rank holds its share of the gate, then its share of the up projection.
        halves = [part.chunk(2) for part in parts]
        parts = [gate for gate, _ in halves] + [up for _, up in halves]
    return torch.cat(parts, parameter.partition_dim)
