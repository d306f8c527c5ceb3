"""Groups to train on: draws prompts, lets the rollout engine sample them, grades groups while others are still being sampled.

    loader --prompts--> actor.encode --features--> rollout --finished groups--> reward pool --scores--> filter --> accepted groups
       ^                                                                                              |
       '--------------------------- another generation batch while too few are accepted ---------------'

Decisions wait until a generation batch is complete, and groups are taken in prompt order: what is accepted never depends on who
finished first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from mindspeed_mm_rl.algorithms.recipes import Recipe
from mindspeed_mm_rl.config.plan import Plan, RecipePlan
from mindspeed_mm_rl.data.loader import PromptLoader
from mindspeed_mm_rl.metrics import Stopwatch
from mindspeed_mm_rl.rewards.pool import RewardPool
from mindspeed_mm_rl.rewards.scoring import GroupScores
from mindspeed_mm_rl.types import Group, Prompt, RolloutGroup, RolloutRequest
from mindspeed_mm_rl.workers.calls import numbered
from mindspeed_mm_rl.workers.failure import WorkerFailed
from mindspeed_mm_rl.workers.group import ActorGroup
from mindspeed_mm_rl.workers.replicas import RolloutGroupStream

_FRUITLESS_BATCHES = 10
"""Generation batches without a single group to train on after which a run ends: its model cannot learn from this metric."""
_LOOK_SECONDS = 1.0

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

    def add(self, groups: list[Group], group_filter: Callable[[Group], bool] | None) -> None:
        """One whole generation batch, in prompt order."""
        kept = [group for group in groups if group_filter is None or group_filter(group)]
        self.generated += groups
        self.groups += kept
        self.num_filtered += len(groups) - len(kept)
        self.num_gen_batches += 1

    def trim(self, wanted: int) -> None:
        self.num_surplus = max(0, len(self.groups) - wanted)
        self.groups = self.groups[:wanted]

    def check_may_go_on(self, plan: RecipePlan) -> None:
        """Raises ValueError when another generation batch is over the limit, or when no batch has ever given a group."""
        if plan.filter_groups and 0 < plan.filter_max_batches <= self.num_gen_batches:
            raise ValueError(
                f"rl_config.filter_groups_max_batches ({plan.filter_max_batches}) generation batches gave {len(self.groups)} groups whose "
                f"samples differ, rl_config.filter_groups_train_batch_size asks for {plan.train_prompts}: raise the limit (-1 = none) or "
                "n_samples_per_prompt, or use other data"
            )
        if self.num_gen_batches >= _FRUITLESS_BATCHES and not self.groups:
            raise ValueError(
                f"{self.num_gen_batches} generation batches ({len(self.generated)} groups) gave no group whose samples differ in "
                f"rl_config.filter_groups_metric {plan.filter_metric!r}; the first group's scores are {self.generated[0].scores}: the "
                "model never answers in the form that rl_config.verifier_function asks for, or its samples are always alike"
            )


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
        """Raises ValueError when there is no use in sampling on (see Collected.check_may_go_on)."""
        collected = Collected()
        while len(collected.groups) < self.plan.recipe.train_prompts:
            collected.check_may_go_on(self.plan.recipe)
            self._add_generation_batch(collected, clock)
        collected.trim(self.plan.recipe.train_prompts)
        return collected

    def _add_generation_batch(self, collected: Collected, clock: Stopwatch) -> None:
        with clock.measure("data"):
            prompts = self.loader.next_prompts(self.plan.run.prompts_per_generation)
        images = self._shared_images(prompts, clock)
        with clock.measure("rollout"):
            first_finished, graded = self._sampled(prompts, images)
        self._wait_for_scores(graded)
        scored = [(prompt, rollouts, future.result()) for prompt, rollouts, future in sorted(graded, key=lambda g: g[0].prompt_id)]
        clock.add("rule_reward", first_finished, time.perf_counter())
        collected.num_reward_timeouts += sum(scores.timeouts for _, _, scores in scored)
        collected.num_reward_crashes += sum(scores.crashes for _, _, scores in scored)
        collected.images += images
        collected.add([Group(p, r.rollouts, s.scores, s.accuracy, s.rewards) for p, r, s in scored], self.recipe.group_filter)

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
        bar = tqdm(total=len(prompts), desc="rollout", unit="group", disable=None, leave=False)
        first_finished = float("inf")
        for rollouts in self.rollout.generate(requests, images):
            prompt = by_id[rollouts.prompt_id]
            texts = [self.tokenizer.decode(rollout.token_ids, skip_special_tokens=True) for rollout in rollouts.rollouts]
            lengths = [len(rollout.token_ids) for rollout in rollouts.rollouts]
            bar.update()
            first_finished = min(first_finished, time.perf_counter())
            graded.append((prompt, rollouts, self.rewards.submit(prompt.prompt_id, texts, lengths, prompt.answer, prompt.data_source)))
        bar.close()
        return first_finished, graded

    def _wait_for_scores(self, graded: list[Graded]) -> None:
        """Raises WorkerFailed, naming prompts, when no group is graded within the bound; and when a trainer rank dies meanwhile."""
        waiting = {future: prompt.prompt_id for prompt, _, future in graded}
        last = time.monotonic()
        while waiting:
            done, _ = wait(waiting, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                del waiting[future]
                last = time.monotonic()
            self.actor.check_alive("rewards")
            if waiting and time.monotonic() - last > self.plan.run.timeout_seconds:
                raise WorkerFailed(
                    f"rewards wait in vain: no group was graded within {self.plan.run.timeout_seconds:g} s (rl_config.timeout_seconds); "
                    f"{numbered('prompts', sorted(waiting.values()))} are unfinished"
                )
