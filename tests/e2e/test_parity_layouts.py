"""One policy on both sides whatever their layouts: the trainer's log-probs are those of every rollout engine after each update."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from mindspeed_mm_rl.algorithms.losses import PolicyLossSettings, clipped_policy_loss
from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.models.families import read_architecture
from mindspeed_mm_rl.trainer.batch import to_batch
from mindspeed_mm_rl.types import Batch, Group, Prompt, RolloutRequest
from mindspeed_mm_rl.workers import placement
from mindspeed_mm_rl.workers.group import ActorGroup
from mindspeed_mm_rl.workers.replicas import RolloutGroupStream
from tests.e2e.test_parity import make_prompts
from tests.plans import whole_plan
from tests.tiny import make_tiny_text

TOLERANCE = 1e-4
UPDATES = 3
LENGTHS = (3, 20, 130, 7, 64, 20)
"""Of text prompts: one fills a block of keys and values, which old weights must not leave behind."""
TP2_PP2 = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
TP2_EP2 = {"tensor_parallel_size": 2, "sequence_parallel": True, "expert_parallel_size": 2}
EMBEDS, PIXELS = {"image_embeds": True}, {"image_embeds": False}
Layouts = Mapping[str, tuple[int, Mapping[str, Any]]]
"""Rollout: devices, and fields of RolloutPlan."""
TP2, DP2 = {"tensor_parallel_size": 2}, {"tensor_parallel_size": 1}
WHOLE_EXPERTS = {"expert_parallel": True}
TWO_GROUPS = {"data_parallel_size": 2} | WHOLE_EXPERTS
WORLDS: dict[str, tuple[Mapping[str, Any], Layouts]] = {
    "pictures": (TP2_PP2, {"TP2": (2, TP2 | PIXELS), "DP2": (2, DP2 | EMBEDS)}),
    "experts": (TP2_EP2, {"TP2": (2, TP2), "TP2, whole experts": (2, TP2 | WHOLE_EXPERTS), "2 groups": (2, TWO_GROUPS)}),
}


@dataclass
class World:
    folder: Path
    actor: ActorGroup
    rollouts: dict[str, RolloutGroupStream]
    prompts: list[Prompt]
    pixels: Any
    embeds: list[Any]

    def publish(self, version: int) -> None:
        handles = self.actor.publish_weights()
        for rollout in self.rollouts.values():
            rollout.receive_weights(handles, version)

    def sample(self, rollout: RolloutGroupStream) -> Batch:
        requests = [RolloutRequest(p.prompt_id, p.token_ids, tuple(i.key for i in p.images), p.expanded_length) for p in self.prompts]
        images = self.embeds if rollout.plan.rollout.image_embeds else [self.pixels]
        by_id = {group.prompt_id: group.rollouts for group in rollout.generate(requests, images)}
        groups = [Group(p, by_id[p.prompt_id], {}, [0.0] * 4, [1.0, 0.0, 0.5, 0.25]) for p in self.prompts]
        return to_batch(groups, read_architecture(self.folder))

    def gap(self, batch: Batch) -> float:
        trainer = self.actor.logprobs(batch, self.embeds)
        return float((torch.cat([trainer[i] for i in batch.sample_ids]) - batch.rollout_logprobs.values).abs().max())

    def update(self, batch: Batch) -> None:
        loss = functools.partial(clipped_policy_loss, settings=PolicyLossSettings(0.2, 0.28))
        advantages = {i: torch.full((n,), (-1.0) ** i) for i, n in zip(batch.sample_ids, batch.responses.lengths, strict=True)}
        self.actor.update(batch.with_column("advantages", advantages), self.embeds, loss)


def text_prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(10, 400, (length,), generator=generator).tolist() for length in LENGTHS]
    return [Prompt(number, row, len(row), (), answer="") for number, row in enumerate(ids)]


def make_world(slots: placement.Slots, plan: Plan, prompts: Sequence[Prompt], layouts: Layouts) -> World:
    """Publishes the vision encoder too: an engine that has none leaves it out."""
    actor = ActorGroup(slots, replace(plan, rollout=replace(plan.rollout, image_embeds=False)), with_reference=False)
    rollouts = {
        name: RolloutGroupStream(replace(slots, count=devices), replace(plan, rollout=replace(plan.rollout, **fields)))
        for name, (devices, fields) in layouts.items()
    }
    for group in (actor, *rollouts.values()):
        group.ready()
    distinct = {image.key: image for prompt in prompts for image in prompt.images}
    embeds = actor.encode(distinct).tables() if distinct else []
    return World(Path(plan.train.hf_path), actor, rollouts, list(prompts), ray.put(distinct), embeds)


@pytest.fixture(scope="module", params=WORLDS)
def world(request: pytest.FixtureRequest, tiny_vl: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    layout, rollouts = WORLDS[request.param]
    folder = tiny_vl
    if request.param == "experts":
        sizes = {"family": "qwen3_moe", "head_dim": 32, "weight_std": 0.1, "more": {"moe_intermediate_size": 64}}
        folder = make_tiny_text(tmp_path_factory.mktemp("experts"), **sizes)
    plan = whole_plan(folder, folder, tmp_path_factory.mktemp("run"))
    train = replace(plan.train, optimizer=replace(plan.train.optimizer, lr=5e-3), **layout)
    plan = replace(plan, run=replace(plan.run, num_devices=4), train=train)
    try:
        prompts = make_prompts(folder) if request.param == "pictures" else text_prompts()
        yield make_world(placement.start(plan.run), plan, prompts, rollouts)
    finally:
        placement.stop()


def test_logprobs_agree_after_each_update_and_tokens_between_layouts(world: World) -> None:
    before = None
    for version in range(UPDATES + 1):
        world.publish(version)
        batches = {name: world.sample(rollout) for name, rollout in world.rollouts.items()}
        for name, batch in batches.items():
            assert world.gap(batch) <= TOLERANCE, (name, version)
            assert batch.rollout_logprobs.values.std() > 0.1
            again = world.sample(world.rollouts[name])
            assert torch.equal(again.responses.values, batch.responses.values), "asked again, the same"
            assert torch.equal(again.rollout_logprobs.values, batch.rollout_logprobs.values)
        first, *others = batches.values()
        assert all(torch.equal(first.responses.values, other.responses.values) for other in others), "the same seeds, the same tokens"
        assert before is None or not torch.equal(before, first.responses.values), "updates must change the policy"
        before = first.responses.values
        world.update(first)
        assert world.gap(first) > 10 * TOLERANCE, "weights that were not pushed would be seen"
