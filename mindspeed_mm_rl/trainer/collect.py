"""Groups to train on: draws prompts, lets the rollout engine sample them, grades groups while others are still being sampled.

    loader --prompts--> pictures --features--> rollout --finished groups--> reward pool --scores--> filter --> accepted groups
       ^                                                                                              |
       '--------------------------- another generation batch while too few are accepted ---------------'

Decisions wait until a generation batch is complete, and groups are taken in prompt order: what is accepted never depends on who
finished first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mindspeed_mm_rl.algorithms.recipes import Recipe
from mindspeed_mm_rl.config.plan import Plan, RecipePlan
from mindspeed_mm_rl.data.loader import PromptLoader
from mindspeed_mm_rl.metrics import Stopwatch
from mindspeed_mm_rl.trainer.pictures import SharedPictures
from mindspeed_mm_rl.trainer.sampler import GroupSampler
from mindspeed_mm_rl.types import Group

_FRUITLESS_BATCHES = 10
"""Generation batches without a single group to train on after which a run ends: its model cannot learn from this metric."""


@dataclass
class Collected:
    """One iteration's groups. `groups` are trained on; `generated` holds every graded group, the filtered and surplus ones included."""

    groups: list[Group] = field(default_factory=list)
    generated: list[Group] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    """Object refs of picture tables, of every generation batch that had pictures."""
    num_pictures: int = 0
    """Distinct ones."""
    num_encoded_pictures: int = 0
    """Passes of pictures through the frozen vision encoder."""
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
    def __init__(self, plan: Plan, recipe: Recipe, loader: PromptLoader, sampler: GroupSampler) -> None:
        self.plan, self.recipe, self.loader, self.sampler = plan, recipe, loader, sampler

    def collect(self, clock: Stopwatch) -> Collected:
        """Raises ValueError when there is no use in sampling on (see Collected.check_may_go_on)."""
        collected, pictures = Collected(), self.sampler.new_pictures()
        while len(collected.groups) < self.plan.recipe.train_prompts:
            collected.check_may_go_on(self.plan.recipe)
            self._add_generation_batch(collected, pictures, clock)
        collected.trim(self.plan.recipe.train_prompts)
        collected.images = pictures.tables()
        collected.num_pictures, collected.num_encoded_pictures = pictures.num_distinct, pictures.num_encoded
        return collected

    def _add_generation_batch(self, collected: Collected, pictures: SharedPictures, clock: Stopwatch) -> None:
        with clock.measure("data"):
            prompts = self.loader.next_prompts(self.plan.run.prompts_per_generation)
        graded = self.sampler.sample(prompts, pictures, clock)
        collected.num_reward_timeouts += graded.timeouts
        collected.num_reward_crashes += graded.crashes
        collected.add(graded.groups, self.recipe.group_filter)
