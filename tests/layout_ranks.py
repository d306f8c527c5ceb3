"""One rank of a few updates under any layout, run by RankPool. What one process does is kept; the others compare themselves with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mindspeed_mm_rl.config.plan import TrainPlan
from mindspeed_mm_rl.data.images import expand_image_tokens, prepare, read_image_settings
from mindspeed_mm_rl.data.packing import balanced_rows
from mindspeed_mm_rl.types import Batch, ImageInput, Ragged
from tests.plans import MAX_PIXELS, MIN_PIXELS

STEPS = 3
RESPONSE_LENGTHS = (3, 21, 5, 4, 17, 9, 2, 2, 11, 6)
PROMPT_LENGTHS = (5, 31, 12, 7, 19)
ADVANTAGES = (1.5, 0.5, -0.5, 2.0, 1.0, 0.75, 2.5, -1.0, 0.25, 1.25)
"""Far from a mean of 0, or the loss would be a small difference of large numbers, and nothing could be said of its digits."""
PICTURES = ((112, 84), (56, 56), (140, 196))
PICTURES_OF_PROMPT = ((1,), (0, 2), (), (1,), (2,))
"""The first pass of a rank may begin in the vision encoder, or without it."""


@dataclass(frozen=True)
class Seen:
    """What a rank knows of the run; numbers that only another rank has are missing."""

    before: dict[int, list[float]]
    """Log-probs, or a critic's values, by sample id before the first update."""
    after: dict[int, list[float]]
    """After the last one."""
    metrics: list[dict[str, float]]
    """Of each update."""
    weights: float
    """Largest difference of this rank's weights, after the last update, from those of one process."""


def run(rank: int, world: int, address: str, plan: TrainPlan, reference: Path, is_critic: bool) -> Seen:
    """STEPS updates of one batch. world 1: the weights that come out are written to `reference`, which the others read."""
    from mindspeed_mm_rl.platforms import device

    device.set_threads(1)
    device.adapt_megatron()
    many_buckets()
    from mindspeed_mm_rl.engines.megatron import process_groups

    process_groups.initialize(plan, rank, world, address)
    try:
        return _train(_critic(plan) if is_critic else _policy(plan), reference, is_reference=world == 1)
    finally:
        process_groups.destroy()


def many_buckets() -> None:
    """Megatron sums and collects 40 million numbers at a time: of a real model there are many such buckets, of a tiny one there would be
    one."""
    from megatron.core import distributed

    if not isinstance(distributed.DistributedDataParallelConfig, functools.partial):
        distributed.DistributedDataParallelConfig = functools.partial(distributed.DistributedDataParallelConfig, bucket_size=20_000)


@dataclass(frozen=True)
class Trained:
    engine: Any
    numbers: Callable[..., dict[int, torch.Tensor]]
    """The engine's answer for each response token: log-probs or values."""
    loss: Callable[..., Any]
    config: dict[str, Any]
    """Of its weights."""


def _policy(plan: TrainPlan) -> Trained:
    from mindspeed_mm_rl.algorithms.losses import PolicyLossSettings, clipped_policy_loss
    from mindspeed_mm_rl.engines.megatron.engine import MegatronTrainEngine

    engine = MegatronTrainEngine(plan, with_reference=False, entropy_bonus=True, publish_vision=True)
    loss = functools.partial(clipped_policy_loss, settings=PolicyLossSettings(0.2, 0.28, kl_coef=0.05, entropy_coeff=0.01))
    return Trained(engine, engine.logprobs, loss, engine.architecture.raw)


def _critic(plan: TrainPlan) -> Trained:
    from mindspeed_mm_rl.algorithms.losses import ValueLossSettings, clipped_value_loss
    from mindspeed_mm_rl.engines.megatron.critic import MegatronCriticEngine
    from mindspeed_mm_rl.models.names import with_value_head

    engine = MegatronCriticEngine(plan)
    if engine.network.post_process:
        # A new head is zero, and then nothing below it has a gradient.
        torch.nn.init.normal_(engine.network.text_decoder.output_layer.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    loss = functools.partial(clipped_value_loss, settings=ValueLossSettings(0.2))
    return Trained(engine, engine.values, loss, with_value_head(engine.architecture.raw))


def _train(trained: Trained, reference: Path, is_reference: bool) -> Seen:
    from mindspeed_mm_rl.engines.base import UpdateRequest
    from mindspeed_mm_rl.models.weight_layout import to_hf

    engine, architecture = trained.engine, trained.engine.architecture
    images = make_images(Path(engine.plan.hf_path)) if architecture.vision else {}
    batch = make_batch(architecture, images)
    rows = own_rows(batch)
    has_encoder = architecture.vision is not None and engine.networks[0].pre_process
    pictures = engine.encode(images) if has_encoder and engine.vision_is_frozen else images
    request = UpdateRequest(batch, rows, float(batch.loss_mask.values.sum()), float(len(batch)))
    before = trained.numbers(batch, rows, pictures)
    metrics = [engine.update(request, pictures, trained.loss) for _ in range(STEPS)]
    after = trained.numbers(batch, rows, pictures)
    engine.whole_parameters()
    if is_reference:
        torch.save(dict(to_hf(engine.network.weights(), trained.config)), reference)
    return Seen(_listed(before), _listed(after), metrics, _difference(trained, torch.load(reference, weights_only=True)))


def own_rows(batch: Batch) -> list[int]:
    """Of this data-parallel rank: whole groups, balanced by tokens."""
    from megatron.core import parallel_state

    shares = balanced_rows(batch.total_lengths(), batch.samples_per_prompt, parallel_state.get_data_parallel_world_size())
    return shares[parallel_state.get_data_parallel_rank()]


def _listed(logprobs: dict[int, torch.Tensor]) -> dict[int, list[float]]:
    return {sample_id: values.tolist() for sample_id, values in logprobs.items()}


def _difference(trained: Trained, whole: dict[str, torch.Tensor]) -> float:
    """whole: by Hugging Face name."""
    from mindspeed_mm_rl.engines.megatron import process_groups
    from mindspeed_mm_rl.models.rank_pieces import chunk_pieces, grid_entries, read_pieces

    engine, place = trained.engine, process_groups.grid_place()
    grid = process_groups.grid(engine.plan, engine.architecture.text.num_layers)
    table, largest = grid_entries(trained.config, grid), 0.0
    for virtual, network in enumerate(engine.networks):
        expected, own = read_pieces(whole, chunk_pieces(table, grid, place, virtual)), network.weights()
        assert expected.keys() == own.keys()
        largest = max([largest, *(float((own[name] - expected[name]).abs().max()) for name in own)])
    return largest


def make_images(folder: Path) -> dict[str, ImageInput]:
    settings, rng = read_image_settings(folder, MIN_PIXELS, MAX_PIXELS), np.random.default_rng(0)
    arrays = [rng.integers(0, 255, (height, width, 3), dtype=np.uint8) for height, width in PICTURES]
    pictures = [prepare(Image.fromarray(array), settings) for array in arrays]
    return {picture.key: picture for picture in pictures}


def make_batch(architecture: Any, images: dict[str, ImageInput]) -> Batch:
    """Ten samples of five prompts, uneven in every length; off-policy, so that clipping acts."""
    generator, n = torch.Generator().manual_seed(3), 2
    keys_of = [tuple(list(images)[i] for i in chosen) if images else () for chosen in PICTURES_OF_PROMPT]
    prompts = []
    for length, keys in zip(PROMPT_LENGTHS, keys_of, strict=True):
        ids = torch.randint(10, 200, (length,), generator=generator).tolist()
        ids[2:2] = [architecture.image_token_id] * len(keys)
        prompts.append(expand_image_tokens(ids, [images[key].grid_thw for key in keys], architecture.image_token_id, 2) if keys else ids)
    flat = torch.randn(sum(RESPONSE_LENGTHS), generator=generator)
    count = len(RESPONSE_LENGTHS)
    return Batch(
        sample_ids=tuple(range(count)),
        prompts=Ragged.from_rows([prompts[i // n] for i in range(count)], torch.int64),
        responses=Ragged.from_rows([torch.randint(10, 200, (length,), generator=generator) for length in RESPONSE_LENGTHS], torch.int64),
        loss_mask=Ragged(torch.ones(sum(RESPONSE_LENGTHS)), RESPONSE_LENGTHS),
        rollout_logprobs=Ragged(flat - 6, RESPONSE_LENGTHS),
        old_logprobs=Ragged(flat * 0.2 - 6.2, RESPONSE_LENGTHS),
        ref_logprobs=Ragged(flat * 0.1 - 6.2, RESPONSE_LENGTHS),
        advantages=Ragged.from_rows(
            [torch.full((length,), value) for length, value in zip(RESPONSE_LENGTHS, ADVANTAGES, strict=True)], torch.float32
        ),
        image_keys=tuple(keys_of[i // n] for i in range(count)),
        rewards=(1.0, 0.0) * (count // n),
        samples_per_prompt=n,
        values=Ragged(flat * 0.5, RESPONSE_LENGTHS),
        returns=Ragged(flat * 0.5 + flat.roll(1), RESPONSE_LENGTHS),
    )
