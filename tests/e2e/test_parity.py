"""One policy on both sides: the trainer's log-probs are those that vLLM sampled with, at the start and after every update."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from PIL import Image

from mindspeed_mm_rl.algorithms.losses import PolicyLossSettings, clipped_policy_loss
from mindspeed_mm_rl.data.images import expand_image_tokens, prepare, read_image_settings
from mindspeed_mm_rl.models.families import read_architecture
from mindspeed_mm_rl.trainer.batch import to_batch
from mindspeed_mm_rl.types import Batch, Group, ImageInput, Prompt, RolloutRequest
from mindspeed_mm_rl.workers import placement
from mindspeed_mm_rl.workers.group import ActorGroup
from mindspeed_mm_rl.workers.replicas import RolloutGroupStream
from tests.plans import MAX_PIXELS, MIN_PIXELS, whole_plan

TOLERANCE = 1e-4
SIZES = ((112, 84), (56, 56), (140, 196), (84, 112))
# The first and the last take as many tokens, so that exchanging them is no error of counts.
IMAGES_OF_PROMPT = ((0,), (1, 2), (), (3,), (2,), (0, 1, 3))


@dataclass
class World:
    actor: ActorGroup
    rollouts: dict[str, RolloutGroupStream]
    prompts: list[Prompt]
    pixels: Any
    embeds: Any
    hf_path: Path

    def sample(self, kind: str) -> list[Group]:
        requests = [RolloutRequest(p.prompt_id, p.token_ids, tuple(i.key for i in p.images), p.expanded_length) for p in self.prompts]
        groups = self.rollouts[kind].generate(requests, [self.pixels] if kind == "pixels" else [self.embeds])
        by_id = {group.prompt_id: group for group in groups}
        scores = [0.0] * 4
        return [Group(p, by_id[p.prompt_id].rollouts, {}, scores, [1.0, 0.0, 0.5, 0.25]) for p in self.prompts]


def make_prompts(hf_path: Path) -> list[Prompt]:
    settings, architecture = read_image_settings(hf_path, MIN_PIXELS, MAX_PIXELS), read_architecture(hf_path)
    rng = np.random.default_rng(1)
    images = [prepare(Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)), settings) for w, h in SIZES]
    token, start, end = architecture.image_token_id, architecture.vision_start_token_id, architecture.vision_end_token_id
    prompts = []
    for number, chosen in enumerate(IMAGES_OF_PROMPT):
        pictures = tuple(images[i] for i in chosen)
        ids = [30 + number] + [t for _ in chosen for t in (start, token, end)] + [50, 51, 52 + number]
        expanded = len(expand_image_tokens(ids, [p.grid_thw for p in pictures], token, 2))
        prompts.append(Prompt(number, ids, expanded, pictures, answer=""))
    return prompts


@pytest.fixture(scope="module")
def world(tiny_vl: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    plan = whole_plan(tiny_vl, tiny_vl, tmp_path_factory.mktemp("parity"))
    plan = replace(plan, train=replace(plan.train, optimizer=replace(plan.train.optimizer, lr=5e-3)))
    prompts = make_prompts(tiny_vl)
    try:
        slots = placement.start(plan.run)
        with_vision = replace(plan, rollout=replace(plan.rollout, image_embeds=False))
        # The trainer publishes the vision encoder too: the engine that runs one needs it, the other leaves it out.
        actor = ActorGroup(slots, with_vision, with_reference=False)
        rollouts = {"embeds": RolloutGroupStream(slots, plan), "pixels": RolloutGroupStream(slots, with_vision)}
        for group in (actor, *rollouts.values()):
            group.ready()
        distinct: dict[str, ImageInput] = {image.key: image for prompt in prompts for image in prompt.images}
        pixels = ray.put(distinct)
        yield World(actor, rollouts, prompts, pixels, actor.encode(distinct).tables()[0], tiny_vl)
    finally:
        placement.stop()


def gap(world: World, batch: Batch) -> float:
    trainer = world.actor.logprobs(batch, [world.embeds])
    ours = torch.cat([trainer[i] for i in batch.sample_ids])
    return float((ours - batch.rollout_logprobs.values).abs().max())


def test_logprobs_agree_at_the_start_and_after_each_update(world: World) -> None:
    architecture = read_architecture(world.hf_path)
    loss = functools.partial(clipped_policy_loss, settings=PolicyLossSettings(0.2, 0.28))
    texts = []
    for version in range(4):
        handle = world.actor.publish_weights()
        for rollout in world.rollouts.values():
            rollout.receive_weights(handle, version)
        batches = {kind: to_batch(world.sample(kind), architecture) for kind in world.rollouts}
        for kind, batch in batches.items():
            assert gap(world, batch) <= TOLERANCE, (kind, version)
            assert not set(batch.responses.values.tolist()) & set(architecture.banned_token_ids)
        assert torch.equal(batches["embeds"].responses.values, batches["pixels"].responses.values), "the same seeds, the same tokens"
        batch = batches["embeds"]
        texts.append(batch.responses.values)
        advantages = {i: torch.full((n,), (-1.0) ** i) for i, n in zip(batch.sample_ids, batch.responses.lengths, strict=True)}
        world.actor.update(batch.with_column("advantages", advantages), [world.embeds], loss)
    assert all(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(texts, texts[1:], strict=False)), (
        "updates must change the policy"
    )


def test_exchanged_pictures_are_noticed(world: World) -> None:
    """The check above would see a picture that reached the wrong sample."""
    world.rollouts["embeds"].receive_weights(world.actor.publish_weights(), 9)
    batch = to_batch(world.sample("embeds"), read_architecture(world.hf_path))
    assert gap(world, batch) <= TOLERANCE
    keys = [prompt.images[0].key for prompt in (world.prompts[0], world.prompts[3])]
    table = ray.get(world.embeds)
    shuffled = table | {keys[0]: table[keys[1]], keys[1]: table[keys[0]]}
    trainer = world.actor.logprobs(batch, [ray.put(shuffled)])
    ours = torch.cat([trainer[i] for i in batch.sample_ids])
    assert float((ours - batch.rollout_logprobs.values).abs().max()) > 100 * TOLERANCE
