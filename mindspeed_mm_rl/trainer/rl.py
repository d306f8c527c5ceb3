"""The one training iteration, for every algorithm; what differs between algorithms is a value of the Recipe."""

from __future__ import annotations

from dataclasses import dataclass

from tqdm import tqdm

from mindspeed_mm_rl.algorithms.kl import KLController
from mindspeed_mm_rl.algorithms.recipes import Recipe
from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.metrics import Stopwatch
from mindspeed_mm_rl.models.families import Architecture
from mindspeed_mm_rl.sinks import MetricLog
from mindspeed_mm_rl.trainer.batch import mini_batches, to_batch
from mindspeed_mm_rl.trainer.collect import Collector
from mindspeed_mm_rl.trainer.record import record_of
from mindspeed_mm_rl.trainer.state import RunState
from mindspeed_mm_rl.workers.group import ActorGroup
from mindspeed_mm_rl.workers.replicas import RolloutGroupStream


@dataclass
class RLTrainer:
    """Everything is built already (trainer/build.py); `train` only turns the wheel."""

    plan: Plan
    recipe: Recipe
    architecture: Architecture
    actor: ActorGroup
    rollout: RolloutGroupStream
    collector: Collector
    kl: KLController
    state: RunState
    log: MetricLog

    def train(self) -> None:
        run = self.plan.run
        self.publish(self.state.iteration)
        for step in range(self.state.iteration + 1, run.train_iters + 1):
            self.log.record(step, self.iteration(step))
            self.state.iteration = step
            if run.save and (step % run.save_interval == 0 or step == run.train_iters):
                self.state.save(self.actor, self.collector.loader, self.kl)

    def iteration(self, step: int) -> dict[str, float]:
        """collect -> (reference, old log-probs) -> advantages -> updates -> weight push; returns what is logged."""
        clock, updates = Stopwatch(), []
        with clock.measure("all"):
            collected = self.collector.collect(clock)
            images = collected.images
            batch = to_batch(collected.groups, self.architecture)
            if self.recipe.needs_reference:
                with clock.measure("reference_model"):
                    batch = batch.with_column("ref_logprobs", self.actor.ref_logprobs(batch, images))
            if self.recipe.needs_old_logprobs or not self.plan.run.on_policy:
                with clock.measure("old_log_p"):
                    batch = batch.with_column("old_logprobs", self.actor.logprobs(batch, images))
            with clock.measure("adv"):
                batch = self.recipe.with_advantages(batch, self.kl.coef)
            policy_loss = self.recipe.policy_loss(self.kl.coef)
            with clock.measure("update"):
                for mini in tqdm(
                    list(mini_batches(batch, self.plan.run, step)), desc="update", unit="mini-batch", disable=None, leave=False
                ):
                    updates.append((len(mini), self.actor.update(mini, images, policy_loss)))
            with clock.measure("resharding_to_infer"):
                self.publish(step)
        record = record_of(self.plan, collected, batch, updates, clock) | {
            "actor/kl_coef": self.kl.coef,
            "rollout/replaced_replicas": float(self.rollout.take_replaced()),
        }
        self.kl.update(record["actor/kl_loss"], len(batch))
        return record

    def publish(self, policy_version: int) -> None:
        """Returns when every replica has taken the weights: only then may they be written again."""
        self.rollout.receive_weights(self.actor.publish_weights(), policy_version)
