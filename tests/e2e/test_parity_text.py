"""One policy on both sides for the text families: the trainer's log-probs are vLLM's, at the start and after an update."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from mindspeed_mm_rl.algorithms.losses import PolicyLossSettings, clipped_policy_loss
from mindspeed_mm_rl.models.families import read_architecture
from mindspeed_mm_rl.trainer.batch import to_batch
from mindspeed_mm_rl.types import Batch, Group, Prompt, RolloutRequest
from mindspeed_mm_rl.workers import placement
from mindspeed_mm_rl.workers.group import ActorGroup
from mindspeed_mm_rl.workers.replicas import RolloutGroupStream
from tests.plans import whole_plan
from tests.tiny import make_tiny_text

TOLERANCE = 1e-4
CONTEXT = 64
"""Tokens that the stretched model was "pretrained" on; the longest prompts go beyond."""
MODELS = {
    "qwen3 untied, wide heads, yarn": {
        "family": "qwen3",
        "hidden": 64,
        "head_dim": 32,
        "rope": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT, "rope_theta": 1000.0},
        "weight_std": 0.15,
    },
    "llama tied": {"family": "llama", "tied": True, "rope": {"rope_theta": 100000.0}, "weight_std": 0.1},
    "qwen3 with experts": {"family": "qwen3_moe", "hidden": 64, "head_dim": 32, "weight_std": 0.15, "more": {"mlp_only_layers": [0]}},
    "deepseek": {
        "family": "deepseek_v3",
        "hidden": 64,
        "kv_heads": 4,
        "weight_std": 0.15,
        # The only sizes that vLLM's kernel for latent attention has on CPU.
        "more": {"kv_lora_rank": 512, "qk_rope_head_dim": 64},
    },
}
LENGTHS = (3, 20, 2 * CONTEXT)


@dataclass
class World:
    folder: Path
    actor: ActorGroup
    rollout: RolloutGroupStream

    def batch(self, version: int) -> Batch:
        self.rollout.receive_weights(self.actor.publish_weights(), version)
        generator = torch.Generator().manual_seed(5)
        ids = [torch.randint(10, 400, (length,), generator=generator).tolist() for length in LENGTHS]
        prompts = [Prompt(number, row, len(row), (), answer="") for number, row in enumerate(ids)]
        found = self.rollout.generate([RolloutRequest(p.prompt_id, p.token_ids, (), p.expanded_length) for p in prompts], [])
        by_id = {group.prompt_id: group.rollouts for group in found}
        return to_batch(
            [Group(p, by_id[p.prompt_id], {}, [0.0] * 4, [1.0, 0.0, 0.5, 0.25]) for p in prompts], read_architecture(self.folder)
        )

    def gap(self, batch: Batch) -> float:
        ours = self.actor.logprobs(batch, [])
        return float((torch.cat([ours[i] for i in batch.sample_ids]) - batch.rollout_logprobs.values).abs().max())


@pytest.fixture(params=MODELS)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    folder = make_tiny_text(tmp_path / "model", **MODELS[request.param])
    plan = whole_plan(folder, folder, tmp_path)
    plan = replace(plan, train=replace(plan.train, optimizer=replace(plan.train.optimizer, lr=5e-3)))
    try:
        slots = placement.start(plan.run)
        world = World(folder, ActorGroup(slots, plan, with_reference=False), RolloutGroupStream(slots, plan))
        world.actor.ready()
        world.rollout.ready()
        yield world
    finally:
        placement.stop()


def test_logprobs_agree_at_the_start_and_after_each_update(world: World) -> None:
    loss = functools.partial(clipped_policy_loss, settings=PolicyLossSettings(0.2, 0.28))
    texts = []
    for version in range(3):
        batch = world.batch(version)
        assert world.gap(batch) <= TOLERANCE, version
        assert batch.rollout_logprobs.values.std() > 0.1
        texts.append(batch.responses.values)
        advantages = {i: torch.full((n,), (-1.0) ** i) for i, n in zip(batch.sample_ids, batch.responses.lengths, strict=True)}
        world.actor.update(batch.with_column("advantages", advantages), [], loss)
        assert world.gap(batch) > 10 * TOLERANCE, "weights that were not pushed would be seen"
    assert all(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(texts, texts[1:], strict=False)), (
        "updates must change the policy"
    )
