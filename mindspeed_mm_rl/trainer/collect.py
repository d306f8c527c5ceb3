"""Groups to train on: draws prompts, lets the rollout engine sample them, grades groups while others are still being sampled.

    loader --prompts--> actor.encode --features--> rollout --finished groups--> reward pool --scores--> filter --> accepted groups
       ^                                                                                              |
       '--------------------------- another generation batch while too few are accepted ---------------'

Decisions wait until a generation batch is complete, and groups are taken in prompt order: what is accepted never depends on who
finished first.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from mindspeed_mm_rl.algorithms.recipes import Recipe
from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.data.loader import PromptLoader
from mindspeed_mm_rl.metrics import Stopwatch
from mindspeed_mm_rl.rewards.pool import RewardPool
from mindspeed_mm_rl.rewards.scoring import GroupScores
from mindspeed_mm_rl.types import Group, Prompt, RolloutGroup, RolloutRequest
from mindspeed_mm_rl.workers.group import ActorGroup, RolloutGroupStream

Graded = tuple[Prompt, RolloutGroup, Future[GroupScores]]


@dataclass
class Collected:
    """One iteration's groups. `groups` are trained on; `generated` holds every graded group, the filtered and surplus ones included."""

    groups: list[Group] = field(default_factory=list)
    generated: list[Group] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    """Object refs of picture tables, of every generation batch that had pictures."""
    num_gen_batches: int = 0
    num_filtered: int = 0
    num_surplus: int = 0
    num_reward_timeouts: int = 0
    """Samples graded wrong because their grading ran out of time."""
    num_reward_crashes: int = 0
    """Samples graded wrong because their grading killed its process."""


class Collector:
    def __init__(
        self,
        plan: Plan,
        recipe: Recipe,
        loader: PromptLoader,
        actor: ActorGroup,
        rollout: RolloutGroupStream,
        rewards: RewardPool,
        tokenizer: Any,
    ) -> None:
        self.plan, self.recipe, self.loader = plan, recipe, loader
        self.actor, self.rollout, self.rewards, self.tokenizer = actor, rollout, rewards, tokenizer

    def collect(self, clock: Stopwatch) -> Collected:
        """Raises ValueError when filter_groups_max_batches generation batches did not give enough groups."""
        wanted, limit = self.plan.recipe.train_prompts, self.plan.recipe.filter_max_batches
        collected = Collected()
        while len(collected.groups) < wanted:
            if self.recipe.group_filter and 0 < limit <= collected.num_gen_batches:
                raise ValueError(
                    f"rl_config.filter_groups_max_batches ({limit}) generation batches gave {len(collected.groups)} groups whose samples "
                    f"differ, rl_config.filter_groups_train_batch_size asks for {wanted}: raise the limit (-1 = none) or "
                    "n_samples_per_prompt, or use other data"
                )
            self._add_generation_batch(collected, clock)
        collected.num_surplus = len(collected.groups) - wanted
        collected.groups = collected.groups[:wanted]
        return collected

    def _add_generation_batch(self, collected: Collected, clock: Stopwatch) -> None:
        with clock.measure("data"):
            prompts = self.loader.next_prompts(self.plan.run.prompts_per_generation)
        images = self._shared_images(prompts, clock)
        with clock.measure("rollout"):
            first_finished, graded = self._sampled(prompts, images)
        scored = [(prompt, rollouts, future.result()) for prompt, rollouts, future in sorted(graded, key=lambda g: g[0].prompt_id)]
        clock.add("rule_reward", first_finished, time.perf_counter())
        collected.num_reward_timeouts += sum(scores.timeouts for _, _, scores in scored)
        collected.num_reward_crashes += sum(scores.crashes for _, _, scores in scored)
        groups = [Group(p, r.rollouts, scores.scores, scores.accuracy, scores.rewards) for p, r, scores in scored]
        kept = [group for group in groups if self.recipe.group_filter is None or self.recipe.group_filter(group)]
        collected.generated += groups
        collected.groups += kept
        collected.images += images
        collected.num_filtered += len(groups) - len(kept)
        collected.num_gen_batches += 1

    def _shared_images(self, prompts: list[Prompt], clock: Stopwatch) -> list[Any]:
        """Object refs of tables of the distinct pictures: encoded where the vision encoder is frozen, else as pixels."""
        import ray

        distinct = {image.key: image for prompt in prompts for image in prompt.images}
        if not distinct:
            return []
        with clock.measure("image_embeds"):
            return self.actor.encode(distinct) if self.plan.rollout.image_embeds else [ray.put(distinct)]

    def _sampled(self, prompts: list[Prompt], images: list[Any]) -> tuple[float, list[Graded]]:
        """When the first group went to the rewards, and every group with the future of its scores."""
        by_id = {prompt.prompt_id: prompt for prompt in prompts}
        requests = [RolloutRequest(p.prompt_id, p.token_ids, tuple(image.key for image in p.images), p.expanded_length) for p in prompts]
        graded: list[Graded] = []
        first_finished = float("inf")
        for rollouts in self.rollout.generate(requests, images):
            prompt = by_id[rollouts.prompt_id]
            texts = [self.tokenizer.decode(rollout.token_ids, skip_special_tokens=True) for rollout in rollouts.rollouts]
            lengths = [len(rollout.token_ids) for rollout in rollouts.rollouts]
            first_finished = min(first_finished, time.perf_counter())
            graded.append((prompt, rollouts, self.rewards.submit(prompt.prompt_id, texts, lengths, prompt.answer, prompt.data_source)))
        return first_finished, graded
