"""The ranks of the trainer, and those of the critic, as one object each that the driver talks to.

A lost rank cannot be replaced: its peers are stuck with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mindspeed_mm_rl.config.plan import Plan, TrainPlan
from mindspeed_mm_rl.data.packing import balanced_rows
from mindspeed_mm_rl.engines.base import PolicyLoss, ValueLoss
from mindspeed_mm_rl.models.saved_weights import VISION_FOLDER
from mindspeed_mm_rl.models.weight_files import ACTOR_FOLDER, CRITIC_FOLDER
from mindspeed_mm_rl.types import Batch, ImageInput, PhaseReport
from mindspeed_mm_rl.weights.device import Address
from mindspeed_mm_rl.weights.host import NodeHandles
from mindspeed_mm_rl.workers import encoding, placement
from mindspeed_mm_rl.workers.actor import ActorWorker
from mindspeed_mm_rl.workers.calls import Call, Pulse, answers, numbered, start_bound
from mindspeed_mm_rl.workers.critic import CriticWorker
from mindspeed_mm_rl.workers.encoding import EncodedTables, Encoder
from mindspeed_mm_rl.workers.failure import Member
from mindspeed_mm_rl.workers.published import Published, publish
from mindspeed_mm_rl.workers.storage import Storage

if TYPE_CHECKING:
    from mindspeed_mm_rl.workers.vision_group import VisionGroup


class TrainGroup:
    """Ranks that train one network. Rows of a batch go to copies of it by whole groups, balanced by tokens.

    Every verb raises WorkerDied, WorkerFailed or ValueError (see workers/calls.py).
    """

    role: str
    """Of a rank, in messages."""
    name: str

    def __init__(self, slots: placement.Slots, plan: Plan, worker: type, train: TrainPlan, **engine_options: bool) -> None:
        """Starts the processes and does not wait for them; `ready` does."""
        self.slots, self.train, self.timeout = slots, train, plan.run.timeout_seconds
        self.turns, earlier = slots.turns, slots.turns.earlier()
        variables = dict(plan.runtime_env) | ({"OMP_NUM_THREADS": str(train.threads)} if train.threads else {})
        self.workers = [
            placement.spawn(slots, worker, rank, variables, plan=train, rank=rank, world_size=slots.count, **engine_options)
            for rank in range(slots.count)
        ]
        self._greetings = [worker.alive.remote() for worker in self.workers]
        meeting_point = self.workers[0].meeting_point.remote()
        self._started = [worker.start.remote(meeting_point, *earlier) for worker in self.workers]
        self.turns.starting(self._started)
        self.members: list[Member] = []
        self._pulse = Pulse([])

    def ready(self) -> int:
        """Trainable parameters of a rank."""
        unknown = [Member(self.role, rank, worker) for rank, worker in enumerate(self.workers)]
        self.members = placement.introduced(unknown, self._greetings, self.slots, range(self.slots.count))
        self._pulse = Pulse(self.members)
        calls = [Call(member, ref) for member, ref in zip(self.members, self._started, strict=True)]
        return answers(calls, start_bound(self.timeout), f"start of the {self.name}")[0]

    def save(self, folder: str) -> None:
        self.turns.take("", self)
        with self.slots.storage.written(folder):
            self._all("save", lambda worker, _: worker.save.remote(folder))

    def load(self, folder: str) -> None:
        self.turns.take("", self)
        self.slots.storage.bring(folder)
        self._all("load", lambda worker, _: worker.load.remote(folder))

    def check_alive(self, doing: str) -> None:
        """Without waiting; for phases in which others work. Raises WorkerDied."""
        self._pulse.check(doing)

    def rest(self) -> None:
        """See Turns. Nothing is asked of processes whose state stays where it is."""
        if self.train.offload:
            self._all("offload", lambda worker, _: worker.offload.remote())

    def phase_reports(self) -> list[PhaseReport]:
        return self._all("memory report", lambda worker, _: worker.phase_report.remote())

    def _all(self, doing: str, call: Callable[[Any, int], Any], about: list[str] | None = None) -> list[Any]:
        calls = [Call(m, call(m.actor, rank), about[rank] if about else "") for rank, m in enumerate(self.members)]
        return answers(calls, self.timeout, doing)

    def written_weights(self) -> NodeHandles:
        """Returns when the files of all nodes are whole."""
        self.turns.take("resharding_to_infer", self)
        nodes = [member.node for member in self.members]
        handles = self._all("weight push", lambda worker, _: worker.publish_weights.remote(nodes))
        return {node: handle for node, handle in zip(nodes, handles, strict=True) if handle is not None}

    def send_weights(self, inboxes: Mapping[int, Address]) -> list[Call]:
        """Under way. inboxes: of the readers, by the bundles that they share with ranks."""
        return [Call(member, member.actor.send_weights.remote(inboxes.get(rank))) for rank, member in enumerate(self.members)]

    def _by_sample(self, doing: str, verb: str, batch: Batch, images: list[Any]) -> dict[int, torch.Tensor]:
        import ray

        shares, ref = self._shares(batch), ray.put(batch)
        about = [_samples(batch, share) for share in shares]
        by_rank = self._all(doing, lambda worker, rank: getattr(worker, verb).remote(ref, shares[rank], images), about)
        return {sample_id: values for answer in by_rank for sample_id, values in answer.items()}

    def _updated(self, doing: str, batch: Batch, images: list[Any], loss: Any) -> dict[str, float]:
        import ray

        shares, ref = self._shares(batch), ray.put(batch)
        return self._all(
            doing,
            lambda worker, rank: worker.update.remote(ref, shares[rank], images, loss, *_totals(batch)),
            [_samples(batch, share) for share in shares],
        )[-1]

    def _shares(self, batch: Batch) -> list[list[int]]:
        """Rows of each rank: ranks of one copy of the network have the same ones."""
        ranks = len(self.members)
        rows = balanced_rows(batch.total_lengths(), batch.samples_per_prompt, self.train.replicas(ranks))
        return [rows[self.train.replica(rank, ranks)] for rank in range(ranks)]


class ActorGroup(TrainGroup):
    role, name = "trainer rank", "trainer"

    def __init__(self, slots: placement.Slots, plan: Plan, with_reference: bool) -> None:
        self.carrier = plan.rollout.weight_carrier
        super().__init__(
            slots, plan, ActorWorker, plan.train,
            with_reference=with_reference, entropy_bonus=plan.recipe.entropy_coeff != 0, publish_vision=not plan.rollout.image_embeds,
        )  # fmt: skip

    def encode(self, images: dict[str, ImageInput]) -> EncodedTables:
        self.turns.take("image_embeds", self)
        return encoding.encode(self.members, self.train, images, self.timeout)

    def logprobs(self, batch: Batch, images: list[Any]) -> dict[int, torch.Tensor]:
        self.turns.take("old_log_p", self)
        return self._by_sample("log-probs", "logprobs", batch, images)

    def ref_logprobs(self, batch: Batch, images: list[Any]) -> dict[int, torch.Tensor]:
        self.turns.take("reference_model", self)
        return self._by_sample("reference log-probs", "ref_logprobs", batch, images)

    def update(self, batch: Batch, images: list[Any], policy_loss: PolicyLoss) -> dict[str, float]:
        self.turns.take("update", self)
        return self._updated("update", batch, images, policy_loss)

    def gradients(self, batch: Batch, images: list[Any], policy_loss: PolicyLoss) -> tuple[dict[str, float], list[Any]]:
        """The metrics of an update up to its step, and object refs of tables of gradients by features, in the order of ranks.

        Between the two nobody else may have the devices, so the caller takes the turn.
        """
        import ray

        shares, ref, totals = self._shares(batch), ray.put(batch), _totals(batch)
        first = [copy[0] for copy in encoding.replicas(self.members, self.train)]
        tables, calls = [], []
        for member, share in zip(self.members, shares, strict=True):
            gradients = member.actor.gradients.options(num_returns=2)
            metrics, table = gradients.remote(ref, share, images, policy_loss, *totals, member in first)
            calls.append(Call(member, metrics, _samples(batch, share)))
            tables += [table] if member in first else []
        return answers(calls, self.timeout, "update")[-1], tables

    def step(self, grad_norm: float) -> dict[str, float]:
        return self._all("update", lambda worker, _: worker.step.remote(grad_norm))[-1]

    def publish_weights(self) -> Published:
        return publish(self.carrier, self)


class CriticGroup(TrainGroup):
    """On the actor's devices, in turns with it."""

    role, name = "critic rank", "critic"

    def __init__(self, slots: placement.Slots, plan: Plan) -> None:
        super().__init__(slots, plan, CriticWorker, plan.critic)

    def values(self, batch: Batch, images: list[Any]) -> dict[int, torch.Tensor]:
        self.turns.take("critic_model", self)
        return self._by_sample("values of the critic", "values", batch, images)

    def update(self, batch: Batch, images: list[Any], value_loss: ValueLoss) -> dict[str, float]:
        self.turns.take("update_critic", self)
        return self._updated("update of the critic", batch, images, value_loss)


@dataclass(frozen=True)
class Trainers:
    """Everything in a run that trains."""

    actor: ActorGroup
    critic: CriticGroup | None = None
    vision: VisionGroup | None = None

    @property
    def encoder(self) -> Encoder:
        """Who encodes pictures for all."""
        return self.vision or self.actor

    @property
    def storage(self) -> Storage:
        return self.actor.slots.storage

    def by_folder(self) -> dict[str, TrainGroup]:
        """Under the names of their folders in a save."""
        groups = {ACTOR_FOLDER: self.actor, VISION_FOLDER: self.vision, CRITIC_FOLDER: self.critic}
        return {name: group for name, group in groups.items() if group is not None}

    def take_metrics(self) -> dict[str, float]:
        """Of memory, see Turns."""
        return self.actor.turns.take_metrics()

    def check_alive(self, doing: str) -> None:
        for group in self.by_folder().values():
            group.check_alive(doing)


def _totals(batch: Batch) -> tuple[float, float]:
    """Denominators of the losses."""
    return float(batch.loss_mask.values.sum()), float(len(batch))


def _samples(batch: Batch, rows: list[int]) -> str:
    return numbered("samples", [batch.sample_ids[row] for row in rows]) if rows else ""
