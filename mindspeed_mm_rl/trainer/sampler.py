"""Prompts to graded groups, for training and for evaluation.

prompts --> pictures --features--> rollout --finished groups--> reward pool --scores--> groups in prompt order

Groups are graded while others are still being sampled.
"""

from __future__ import annotations

import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.metrics import Stopwatch
from mindspeed_mm_rl.platforms import signals
from mindspeed_mm_rl.rewards.pool import RewardPool
from mindspeed_mm_rl.rewards.scoring import GroupScores
from mindspeed_mm_rl.trainer.pictures import SharedPictures
from mindspeed_mm_rl.types import Group, Prompt, RolloutGroup, RolloutRequest, Sampling
from mindspeed_mm_rl.workers.calls import numbered
from mindspeed_mm_rl.workers.failure import WorkerFailed
from mindspeed_mm_rl.workers.group import Trainers
from mindspeed_mm_rl.workers.replicas import RolloutGroupStream

_LOOK_SECONDS = 1.0

Graded = tuple[Prompt, RolloutGroup, Future[GroupScores]]


@dataclass(frozen=True)
class GradedGroups:
    """Every prompt that was asked for, in prompt order."""

    groups: list[Group]
    timeouts: int
    """Samples graded wrong because their grading ran out of time."""
    crashes: int
    """Samples graded wrong because their grading killed its process."""


class GroupSampler:
    def __init__(self, plan: Plan, trainers: Trainers, rollout: RolloutGroupStream, rewards: RewardPool, tokenizer: Any) -> None:
        self.plan, self.trainers, self.rollout, self.rewards, self.tokenizer = plan, trainers, rollout, rewards, tokenizer

    def new_pictures(self) -> SharedPictures:
        return SharedPictures(self.trainers.encoder if self.plan.rollout.image_embeds else None)

    def sample(self, prompts: list[Prompt], pictures: SharedPictures, clock: Stopwatch, sampling: Sampling | None = None) -> GradedGroups:
        """pictures: takes up those of the prompts. sampling: other than training's.

        Raises WorkerFailed when somebody is silent for too long.
        """
        with clock.measure("image_embeds"):
            images = pictures.of(prompts)
        with clock.measure("rollout"):
            first_finished, graded = self._sampled(prompts, images, sampling)
        self._wait_for_scores(graded)
        scored = [(prompt, rollouts, future.result()) for prompt, rollouts, future in sorted(graded, key=lambda g: g[0].prompt_id)]
        clock.add("rule_reward", first_finished, time.perf_counter())
        for interval in (scores.model_interval for _, _, scores in scored if scores.model_interval):
            clock.add("reward_model", *interval)
        return GradedGroups(
            groups=[Group(p, r.rollouts, s.scores, s.accuracy, s.rewards, s.metrics) for p, r, s in scored],
            timeouts=sum(scores.timeouts for _, _, scores in scored),
            crashes=sum(scores.crashes for _, _, scores in scored),
        )

    def _sampled(self, prompts: list[Prompt], images: list[Any], sampling: Sampling | None) -> tuple[float, list[Graded]]:
        """When the first group went to the rewards, and every group with the future of its scores."""
        by_id = {prompt.prompt_id: prompt for prompt in prompts}
        requests = [RolloutRequest(p.prompt_id, p.token_ids, tuple(image.key for image in p.images), p.expanded_length) for p in prompts]
        graded: list[Graded] = []
        bar = tqdm(total=len(prompts), desc=sampling.stream if sampling else "rollout", unit="group", disable=None, leave=False)
        first_finished = float("inf")
        for rollouts in self.rollout.generate(requests, images, sampling):
            prompt = by_id[rollouts.prompt_id]
            texts = [self._text(rollout.token_ids) for rollout in rollouts.rollouts]
            lengths = [len(rollout.token_ids) for rollout in rollouts.rollouts]
            bar.update()
            first_finished = min(first_finished, time.perf_counter())
            graded.append((prompt, rollouts, self._submit(prompt, texts, lengths)))
        bar.close()
        return first_finished, graded

    def _text(self, token_ids: list[int]) -> str:
        # As it was written: with transformers 4 some tokenizers, Llama's among them, take out blanks before punctuation.
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _submit(self, prompt: Prompt, texts: list[str], lengths: list[int]) -> Future[GroupScores]:
        return self.rewards.submit(prompt.prompt_id, texts, lengths, prompt.answer, prompt.data_source, prompt.extra, prompt.messages)

    def _wait_for_scores(self, graded: list[Graded]) -> None:
        """Raises WorkerFailed, naming prompts, when no group is graded within the bound, and WorkerDied when a rank that trains dies."""
        waiting = {future: prompt.prompt_id for prompt, _, future in graded}
        last = time.monotonic()
        while waiting:
            done, _ = wait(waiting, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
            signals.let_through()
            for future in done:
                del waiting[future]
                last = time.monotonic()
            self.trainers.check_alive("rewards")
            if waiting and time.monotonic() - last > self.plan.run.timeout_seconds:
                raise WorkerFailed(
                    f"rewards wait in vain: no group was graded within {self.plan.run.timeout_seconds:g} s (rl_config.timeout_seconds); "
                    f"{numbered('prompts', sorted(waiting.values()))} are unfinished"
                )
