"""The one training iteration, for every algorithm; what differs between algorithms is a value of the Recipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from mindspeed_mm_rl.algorithms.kl import KLController
from mindspeed_mm_rl.algorithms.recipes import Recipe
from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.metrics import Stopwatch
from mindspeed_mm_rl.models.families import Architecture
from mindspeed_mm_rl.sinks import MetricLog
from mindspeed_mm_rl.trainer.batch import mini_batches, to_batch
from mindspeed_mm_rl.trainer.collect import Collector
from mindspeed_mm_rl.trainer.evaluate import Evaluator
from mindspeed_mm_rl.trainer.record import Updates, record_of
from mindspeed_mm_rl.trainer.state import RunState
from mindspeed_mm_rl.types import Batch
from mindspeed_mm_rl.workers.group import Trainers
from mindspeed_mm_rl.workers.replicas import RolloutGroupStream


@dataclass
class RLTrainer:
    """Everything is built already (trainer/build.py); `train` only turns the wheel."""

    plan: Plan
    recipe: Recipe
    architecture: Architecture
    trainers: Trainers
    rollout: RolloutGroupStream
    collector: Collector
    kl: KLController
    state: RunState
    log: MetricLog
    evaluator: Evaluator

    def train(self) -> None:
        run = self.plan.run
        self.publish(self.state.iteration)
        if self.state.iteration == 0 and (before := self.evaluator.after(0)):
            self.log.record(0, before)
        for step in range(self.state.iteration + 1, run.train_iters + 1):
            self.log.record(step, self.iteration(step) | self.evaluator.after(step))
            self.state.iteration = step
            if run.saves_after(step):
                self.state.save(self.trainers.by_folder(), self.collector.loader, self.kl)

    def iteration(self, step: int) -> dict[str, float]:
        """collect -> (reference, old log-probs, values) -> advantages -> updates -> weight push; returns what is logged."""
        clock, actor = Stopwatch(), self.trainers.actor
        with clock.measure("all"):
            collected = self.collector.collect(clock)
            images = collected.images
            batch = to_batch(collected.groups, self.architecture)
            if self.recipe.needs_reference:
                with clock.measure("reference_model"):
                    batch = batch.with_column("ref_logprobs", actor.ref_logprobs(batch, images))
            if self.recipe.needs_old_logprobs or not self.plan.run.on_policy:
                with clock.measure("old_log_p"):
                    batch = batch.with_column("old_logprobs", actor.logprobs(batch, images))
            if self.recipe.needs_critic:
                with clock.measure("critic_model"):
                    batch = batch.with_column("values", self.trainers.critic.values(batch, images))
            with clock.measure("adv"):
                batch = self.recipe.with_advantages(batch, self.kl.coef)
            updates = self.update(step, batch, images, clock)
            with clock.measure("resharding_to_infer"):
                self.publish(step)
        record = record_of(self.plan, self.recipe, collected, batch, updates, clock) | {
            "actor/kl_coef": self.kl.coef,
            "rollout/replaced_replicas": float(self.rollout.take_replaced()),
            **self.trainers.take_metrics(),
        }
        if updates.actor:
            self.kl.update(record["actor/kl_in_reward" if self.recipe.kl_in_reward else "actor/kl_loss"], len(batch))
        return record

    def update(self, step: int, batch: Batch, images: list[Any], clock: Stopwatch) -> Updates:
        """One optimizer step of critic and actor per mini-batch, of the critic alone in its warm-up.

        All steps of the critic come first: neither looks at the other, and each may have to leave the device for the other.
        """
        updates, minis = Updates(), list(mini_batches(batch, self.plan.run, step))
        policy_loss, value_loss = self.recipe.policy_loss(self.kl.coef), self.recipe.value_loss
        if self.recipe.needs_critic:
            for mini in _shown(minis, "update of the critic"):
                with clock.measure("update_critic"):
                    updates.critic.append((len(mini), self.trainers.critic.update(mini, images, value_loss)))
        if step > self.plan.run.critic_warmup:
            for mini in _shown(minis, "update"):
                with clock.measure("update"):
                    updates.actor.append((len(mini), self.trainers.actor.update(mini, images, policy_loss)))
        return updates

    def publish(self, policy_version: int) -> None:
        """Returns when every replica has taken the weights: only then may they be written again."""
        self.rollout.receive_weights(self.trainers.actor.publish_weights(), policy_version)


def _shown(minis: Sequence[Batch], doing: str) -> Iterable[Batch]:
    """With a bar on a terminal."""
    return tqdm(minis, desc=doing, unit="mini-batch", disable=None, leave=False)
