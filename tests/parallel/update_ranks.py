"""One data-parallel rank of an update: run by `test_data_parallel.py` in processes of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm_rl.data.packing import balanced_rows
from mindspeed_mm_rl.types import Batch, Ragged
from tests.plans import optimizer_plan, train_plan

RESPONSE_LENGTHS = (3, 21, 5, 4, 17, 9, 2, 2, 11, 6)
PROMPT_LENGTHS = (5, 5, 30, 30, 12, 12, 7, 7, 19, 19)
SETTINGS = {
    "grpo_token_level": {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "kl_coef": 0.01},
    "grpo_sequence_level": {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "kl_coef": 0.01, "token_level_loss": False},
    "dapo_token_level": {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28},
    "dapo_sequence_level": {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "token_level_loss": False},
}
CRITIC = "ppo_critic"


def make_batch() -> Batch:
    """Ten samples of five prompts, uneven in every length, two samples a group; off-policy, so that clipping acts."""
    generator = torch.Generator().manual_seed(3)
    flat = torch.randn(sum(RESPONSE_LENGTHS), generator=generator)
    prompts = [torch.randint(10, 200, (PROMPT_LENGTHS[i - i % 2],), generator=generator) for i in range(10)]
    return Batch(
        sample_ids=tuple(range(10)),
        prompts=Ragged.from_rows([prompts[i - i % 2] for i in range(10)], torch.int64),
        responses=Ragged.from_rows([torch.randint(10, 200, (n,), generator=generator) for n in RESPONSE_LENGTHS], torch.int64),
        loss_mask=Ragged(torch.ones(sum(RESPONSE_LENGTHS)), RESPONSE_LENGTHS),
        rollout_logprobs=Ragged(flat - 6, RESPONSE_LENGTHS),
        old_logprobs=Ragged(flat * 0.2 - 6.2, RESPONSE_LENGTHS),
        ref_logprobs=Ragged(flat * 0.1 - 6.2, RESPONSE_LENGTHS),
        advantages=Ragged.from_rows([torch.full((n,), (-1.0) ** i * (1 + i // 2)) for i, n in enumerate(RESPONSE_LENGTHS)], torch.float32),
        image_keys=((),) * 10,
        rewards=(1.0, 0.0) * 5,
        samples_per_prompt=2,
        values=Ragged(flat * 0.5, RESPONSE_LENGTHS),
        returns=Ragged(flat * 0.5 + flat.roll(1), RESPONSE_LENGTHS),
    )


def _without_float64(all_reduce: Callable[..., Any]) -> Callable[..., Any]:
    """As on an NPU, where such a tensor would come back as it was: MindSpeed reduces a copy of it."""

    @functools.wraps(all_reduce)
    def reduce(tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        assert tensor.dtype is not torch.float64
        return all_reduce(tensor, *arguments, **named)

    return reduce


def run(rank: int, world: int, model: Path, address: str, folder: Path, groups: int) -> None:
    """All gradients and metrics of one update per setting to folder/GROUPS_WORLD.pt; groups: how many of the batch's five are used."""
    from mindspeed_mm_rl.platforms import device

    torch.distributed.all_reduce = _without_float64(torch.distributed.all_reduce)
    device.adapt_megatron()
    device.set_threads(1)
    from mindspeed_mm_rl.algorithms.losses import PolicyLossSettings, ValueLossSettings, clipped_policy_loss, clipped_value_loss
    from mindspeed_mm_rl.engines.base import UpdateRequest
    from mindspeed_mm_rl.engines.megatron import process_groups
    from mindspeed_mm_rl.engines.megatron.critic import MegatronCriticEngine
    from mindspeed_mm_rl.engines.megatron.engine import MegatronTrainEngine

    plan = train_plan(model, max_samples_per_micro_batch=2, optimizer=optimizer_plan(clip_grad=0.0))
    process_groups.initialize(plan, rank, world, address)
    batch = make_batch().select(range(2 * groups))
    share = balanced_rows(batch.total_lengths(), 2, world)[rank]
    request = UpdateRequest(batch, share, float(batch.loss_mask.values.sum()), float(len(batch)))
    critic = MegatronCriticEngine(plan)
    # A new head is zero, and then nothing below it has a gradient.
    torch.nn.init.normal_(critic.network.text_decoder.output_layer.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    metrics = critic.update(request, {}, functools.partial(clipped_value_loss, settings=ValueLossSettings(0.2)))
    answers = {CRITIC: (_gradients(critic), metrics)}
    for name, settings in SETTINGS.items():
        engine = MegatronTrainEngine(plan, with_reference=False, entropy_bonus=False, publish_vision=False)
        metrics = engine.update(request, {}, functools.partial(clipped_policy_loss, settings=PolicyLossSettings(**settings)))
        answers[name] = (_gradients(engine), metrics)
    if rank == 0:
        torch.save(answers, folder / f"{groups}_{world}.pt")
    process_groups.destroy()


def _gradients(engine: Any) -> dict[str, torch.Tensor]:
    return {key: p.main_grad.clone() for key, p in engine.network.named_parameters() if p.requires_grad}
