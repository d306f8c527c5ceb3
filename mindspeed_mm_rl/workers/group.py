"""The ranks of the trainer, and those of the critic, as one object each that the driver talks to.

A lost rank cannot be replaced: its peers are stuck with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mindspeed_mm_rl.config.plan import Plan, TrainPlan
from mindspeed_mm_rl.data.packing import balanced_shares
from mindspeed_mm_rl.engines.base import PolicyLoss, ValueLoss
from mindspeed_mm_rl.models.weight_files import ACTOR_FOLDER, CRITIC_FOLDER
from mindspeed_mm_rl.types import Batch, ImageInput
from mindspeed_mm_rl.weights.host import WeightHandle
from mindspeed_mm_rl.workers import placement
from mindspeed_mm_rl.workers.actor import ActorWorker
from mindspeed_mm_rl.workers.calls import Call, Pulse, answers, numbered, start_bound
from mindspeed_mm_rl.workers.critic import CriticWorker
from mindspeed_mm_rl.workers.failure import Member


class TrainGroup:
    """Ranks that train one network. Rows of a batch go to data-parallel ranks by whole groups, balanced by tokens.

    Every verb raises WorkerDied, WorkerFailed or ValueError (see workers/calls.py).
    """

    role: str
    """Of a rank, in messages."""
    name: str

    def __init__(self, slots: placement.Slots, plan: Plan, worker: type, train: TrainPlan, **engine_options: bool) -> None:
        """Starts the processes and does not wait for them; `ready` does."""
        self.slots, self.timeout = slots, plan.run.timeout_seconds
        variables = dict(plan.runtime_env) | {"OMP_NUM_THREADS": str(train.threads)}
        self.workers = [
            placement.spawn(slots, worker, rank, variables, plan=train, rank=rank, world_size=slots.count, **engine_options)
            for rank in range(slots.count)
        ]
        self._greetings = [worker.alive.remote() for worker in self.workers]
        meeting_point = self.workers[0].meeting_point.remote()
        self._started = [worker.start.remote(meeting_point) for worker in self.workers]
        self.members: list[Member] = []
        self._pulse = Pulse([])

    def ready(self) -> int:
        """Trainable parameters of a rank."""
        self.members = placement.introduced(self.role, self.workers, self._greetings, self.slots)
        self._pulse = Pulse(self.members)
        calls = [Call(member, ref) for member, ref in zip(self.members, self._started, strict=True)]
        return answers(calls, start_bound(self.timeout), f"start of the {self.name}")[0]

    def save(self, folder: str) -> None:
        self._all("save", lambda worker, _: worker.save.remote(folder))

    def load(self, folder: str) -> None:
        self._all("load", lambda worker, _: worker.load.remote(folder))

    def check_alive(self, doing: str) -> None:
        """Without waiting; for phases in which others work. Raises WorkerDied."""
        self._pulse.check(doing)

    def peak_memory(self) -> int:
        return sum(self._all("memory report", lambda worker, _: worker.peak_memory.remote()))

    def _all(self, doing: str, call: Callable[[Any, int], Any], about: list[str] | None = None) -> list[Any]:
        calls = [Call(m, call(m.actor, rank), about[rank] if about else "") for rank, m in enumerate(self.members)]
        return answers(calls, self.timeout, doing)

    def _by_sample(self, doing: str, verb: str, batch: Batch, images: list[Any]) -> dict[int, torch.Tensor]:
        import ray

        shares, ref = self._shares(batch), ray.put(batch)
        about = [_samples(batch, share) for share in shares]
        by_rank = self._all(doing, lambda worker, rank: getattr(worker, verb).remote(ref, shares[rank], images), about)
        return {sample_id: values for answer in by_rank for sample_id, values in answer.items()}

    def _updated(self, doing: str, batch: Batch, images: list[Any], loss: Any) -> dict[str, float]:
        import ray

        shares, ref = self._shares(batch), ray.put(batch)
        totals = (float(batch.loss_mask.values.sum()), float(len(batch)))
        return self._all(
            doing,
            lambda worker, rank: worker.update.remote(ref, shares[rank], images, loss, *totals),
            [_samples(batch, share) for share in shares],
        )[0]

    def _shares(self, batch: Batch) -> list[list[int]]:
        n = batch.samples_per_prompt
        lengths = batch.total_lengths()
        weights = [sum(lengths[start : start + n]) for start in range(0, len(batch), n)]
        return [[group * n + k for group in share for k in range(n)] for share in balanced_shares(weights, len(self.members))]


class ActorGroup(TrainGroup):
    role, name = "trainer rank", "trainer"

    def __init__(self, slots: placement.Slots, plan: Plan, with_reference: bool) -> None:
        super().__init__(
            slots, plan, ActorWorker, plan.train,
            with_reference=with_reference, entropy_bonus=plan.recipe.entropy_coeff != 0, publish_vision=not plan.rollout.image_embeds,
        )  # fmt: skip

    def encode(self, images: dict[str, ImageInput]) -> list[Any]:
        """Every picture once, shared out over the ranks; object refs of the encoded tables, finished, which the driver never holds."""
        keys = list(images)
        shares = balanced_shares([math.prod(images[key].grid_thw) for key in keys], len(self.members))
        tables, calls = [], []
        for member, share in zip(self.members, shares, strict=False):
            if share:
                table, count = member.actor.encode.options(num_returns=2).remote({keys[i]: images[keys[i]] for i in share})
                tables.append(table)
                # The count says that the table is there, or why not, without bringing it here.
                calls.append(Call(member, count, f"{len(share)} pictures"))
        answers(calls, self.timeout, "vision encoder")
        return tables

    def logprobs(self, batch: Batch, images: list[Any]) -> dict[int, torch.Tensor]:
        return self._by_sample("log-probs", "logprobs", batch, images)

    def ref_logprobs(self, batch: Batch, images: list[Any]) -> dict[int, torch.Tensor]:
        return self._by_sample("reference log-probs", "ref_logprobs", batch, images)

    def update(self, batch: Batch, images: list[Any], policy_loss: PolicyLoss) -> dict[str, float]:
        return self._updated("update", batch, images, policy_loss)

    def publish_weights(self) -> WeightHandle:
        """Data-parallel ranks hold the same weights, so the first one writes them."""
        writer = self.members[0]
        return answers([Call(writer, writer.actor.publish_weights.remote())], self.timeout, "weight push")[0]


class CriticGroup(TrainGroup):
    """On the actor's devices, in turns with it."""

    role, name = "critic rank", "critic"

    def __init__(self, slots: placement.Slots, plan: Plan) -> None:
        super().__init__(slots, plan, CriticWorker, plan.critic)

    def values(self, batch: Batch, images: list[Any]) -> dict[int, torch.Tensor]:
        return self._by_sample("values of the critic", "values", batch, images)

    def update(self, batch: Batch, images: list[Any], value_loss: ValueLoss) -> dict[str, float]:
        return self._updated("update of the critic", batch, images, value_loss)


@dataclass(frozen=True)
class Trainers:
    """Everything in a run that trains."""

    actor: ActorGroup
    critic: CriticGroup | None = None

    def by_folder(self) -> dict[str, TrainGroup]:
        """Under the names of their folders in a save."""
        return {ACTOR_FOLDER: self.actor} | ({} if self.critic is None else {CRITIC_FOLDER: self.critic})

    def check_alive(self, doing: str) -> None:
        for group in self.by_folder().values():
            group.check_alive(doing)


def _samples(batch: Batch, rows: list[int]) -> str:
    return numbered("samples", [batch.sample_ids[row] for row in rows]) if rows else ""
