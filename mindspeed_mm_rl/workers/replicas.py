"""The rollout processes as one object that the driver talks to. A replica that dies is replaced, and what it had in hand is done again.

dead stream -> new processes on the same bundles -> weights of the last push (the trainer's buffer still holds them)
            -> its unfinished prompts again: the noise of a sample depends on its id alone, so the tokens are the same
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.data.packing import balanced_shares
from mindspeed_mm_rl.engines.vllm.environment import rollout_env, without_segments
from mindspeed_mm_rl.platforms import signals
from mindspeed_mm_rl.types import PhaseReport, RolloutGroup, RolloutRequest, Sampling
from mindspeed_mm_rl.weights.host import NodeHandles
from mindspeed_mm_rl.workers import placement
from mindspeed_mm_rl.workers.calls import Call, answers, numbered, silent, start_bound, to_blame
from mindspeed_mm_rl.workers.failure import Member, WorkerDied, WorkerFailed
from mindspeed_mm_rl.workers.published import DOING, Published, UnderWay
from mindspeed_mm_rl.workers.rollout import RolloutWorker

_ROLE = "rollout replica"
_MAX_REPLACEMENTS = 3
"""Of a whole run: more than that is no accident, and a process that dies at every start would be replaced for ever."""
_LOOK_SECONDS = 1.0
_log = logging.getLogger(__name__)


class Replica:
    """One rollout engine: as many processes as it has ranks, on neighbouring bundles."""

    def __init__(self, slots: placement.Slots, plan: Plan, number: int) -> None:
        """Starts the processes and does not wait for them; `ready` does."""
        self.number, self._slots, self._timeout = number, slots, plan.run.timeout_seconds
        size = plan.rollout.num_ranks
        self.places = range(number * size, (number + 1) * size)
        """Bundles of its processes."""
        variables = rollout_env(plan.rollout.threads) | without_segments(dict(plan.runtime_env))
        self.workers = [
            placement.spawn(slots, RolloutWorker, place, variables, plan=plan.rollout, seed=plan.rollout.seed, rank=rank)
            for rank, place in enumerate(self.places)
        ]
        self._greetings = [worker.alive.remote() for worker in self.workers]
        meeting_point = self.workers[0].meeting_point.remote() if size > 1 else None
        earlier = slots.turns.earlier()
        self._started = [worker.start.remote(meeting_point, *earlier) for worker in self.workers]
        self.members: list[Member] = []

    def ready(self) -> None:
        ranks = range(len(self.workers)) if len(self.workers) > 1 else (None,)
        unknown = [Member(_ROLE, self.number, worker, rank=rank) for worker, rank in zip(self.workers, ranks, strict=True)]
        self.members = placement.introduced(unknown, self._greetings, self._slots, self.places)
        calls = [Call(member, ref) for member, ref in zip(self.members, self._started, strict=True)]
        answers(calls, start_bound(self._timeout), "start of the rollout engine")

    def is_starting(self) -> bool:
        """Waits for about a second; False when there is something to say, good or bad."""
        import ray

        return not ray.wait(self._started, num_returns=1, timeout=_LOOK_SECONDS)[0]

    def calls(self, verb: str, *arguments: Any) -> list[Call]:
        """verb: of the workers."""
        return [Call(member, getattr(member.actor, verb).remote(*arguments)) for member in self.members]

    def receive_weights(self, handles: NodeHandles, policy_version: int) -> list[Call]:
        """handles: of every node on which a process trains. Raises ValueError when there is none on a node of this replica."""
        calls = []
        for member in self.members:
            if member.node not in handles:
                raise ValueError(
                    f"{member} is on a node on which no process trains (those are {', '.join(sorted(handles))}), so that it cannot get "
                    "weights; let rl_config.actor_resource.num_npus be all the devices of its nodes"
                )
            calls.append(Call(member, member.actor.receive_weights.remote(handles[member.node], policy_version)))
        return calls

    def stop(self) -> None:
        """What is left of the processes: without one of them the others wait in vain."""
        import ray

        for worker in self.workers:
            ray.kill(worker)


class _Share:
    """What one replica has in hand: of each tensor-parallel group a stream of its first rank, and the others, which keep pace with it."""

    def __init__(self, replica: Replica, shares: Sequence[list[RolloutRequest]], images: list[Any], sampling: Sampling) -> None:
        """shares: requests of each of its groups."""
        self.replica = replica
        self.unfinished = {request.prompt_id: request for requests in shares for request in requests}
        self.since = time.monotonic()
        """When the replica last finished a group, or began."""
        self._calls: dict[Any, Call] = {}
        self._prompts: dict[Any, set[int]] = {}
        """Of each stream."""
        size = len(replica.members) // len(shares)
        for number, requests in enumerate(shares):
            first, *others = replica.members[number * size : (number + 1) * size]
            stream = first.actor.generate.options(num_returns="streaming").remote(requests, images, sampling)
            self._calls[stream] = Call(first, stream.completed())
            self._prompts[stream] = {request.prompt_id for request in requests}
            for other in others:
                ref = other.actor.keep_pace.remote(requests, images, sampling)
                self._calls[ref] = Call(other, ref)
        self.pending = list(self._calls)
        """What `read` may be called with as soon as ray.wait names it; empty when all is done."""

    def read(self, ready: Any, doing: str, timeout_seconds: float) -> RolloutGroup | None:
        """The next group, where it is a stream that has something to say. Raises WorkerDied, WorkerFailed or ValueError."""
        import ray

        own, prompts = self._calls[ready], self._prompts.get(ready)
        try:
            ref = ready if prompts is None else next(ready, None)
            group = None if ref is None else ray.get(ref)
        except ray.exceptions.RayError as error:
            others = [call.ref for call in self._calls.values() if call is not own]
            raise to_blame(list(self._calls.values()), {own.ref: error}, others, timeout_seconds, doing) from error
        if group is not None:
            del self.unfinished[group.prompt_id]
            self.since = time.monotonic()
            return group
        self.pending.remove(ready)
        if missing := sorted((prompts or set()) & self.unfinished.keys()):
            raise WorkerFailed(f"{own.member} ended its stream without {numbered('prompts', missing)}")
        return None

    def late(self) -> list[Call]:
        about = f"{numbered('prompts', sorted(self.unfinished))} unfinished" if self.unfinished else ""
        return [Call(call.member, call.ref, about) for call in self._calls.values()]


def dealt(requests: Sequence[RolloutRequest], max_tokens: int, replicas: int) -> list[list[RolloutRequest]]:
    """Requests of each replica (or group in one), balanced by prompt and longest response.

    What is known of the responses' lengths is the same for all prompts, so that a better guess would only move the weight of prompts; and a
    mean of those before would be state that a resumed run lacks.
    """
    shares = balanced_shares([request.expanded_length + max_tokens for request in requests], replicas)
    return [[requests[i] for i in share] for share in shares]


class RolloutGroupStream:
    """All rollout replicas. Prompts are dealt by expected length; finished groups are merged as they come."""

    def __init__(self, slots: placement.Slots, plan: Plan) -> None:
        """Starts the processes and does not wait for them; `ready` does."""
        self.slots, self.plan, self.timeout = slots, plan, plan.run.timeout_seconds
        self._training = Sampling(plan.run.samples_per_prompt)
        self._replicas = [Replica(slots, plan, number) for number in range(slots.count // plan.rollout.num_ranks)]
        self.while_waiting: Callable[[str], None] = lambda doing: None
        """Called about once a second while groups are awaited, with what is going on: a look at those who are idle meanwhile."""
        self._pushed: tuple[Published, int] | None = None
        self._bare: list[Replica] = []
        """Without the weights of the last push."""
        self._replaced = self._replaced_before = 0

    @property
    def workers(self) -> list[Any]:
        return [worker for replica in self._replicas for worker in replica.workers]

    @property
    def members(self) -> list[Member]:
        return [member for replica in self._replicas for member in replica.members]

    def ready(self) -> None:
        for replica in self._replicas:
            replica.ready()
        self.rest()

    def generate(self, requests: list[RolloutRequest], images: list[Any], sampling: Sampling | None = None) -> Iterator[RolloutGroup]:
        """Yields groups in finish order. sampling: other than training's.

        Raises WorkerFailed, naming replica and prompts, when a replica finishes nothing within the bound or too many have died.
        """
        import ray

        sampling = sampling or self._training
        self.slots.turns.take("" if sampling.stream else "rollout", self)
        self._fill_beside_work()
        doing = sampling.stream or "rollout"
        shares_of = dealt(requests, self.plan.rollout.max_tokens, len(self._replicas))
        shares = [self._begun(replica, own, images, sampling) for replica, own in zip(self._replicas, shares_of, strict=True) if own]
        while shares:
            pending = {ref: share for share in shares for ref in share.pending}
            done, _ = ray.wait(list(pending), num_returns=1, timeout=_LOOK_SECONDS)
            signals.let_through()
            for ref in done:
                share = pending[ref]
                try:
                    group = share.read(ref, doing, self.timeout)
                except WorkerDied as death:
                    shares.remove(share)
                    self._replace(share.replica, death)
                    # In which a successor may die, too.
                    self._fill_beside_work()
                    if share.unfinished:
                        successor = self._replicas[share.replica.number]
                        shares.append(self._begun(successor, list(share.unfinished.values()), images, sampling))
                    continue
                if group is not None:
                    yield group
                elif not share.pending:
                    shares.remove(share)
            self.while_waiting(doing)
            self._check_progress(shares, doing)

    def _begun(self, replica: Replica, requests: list[RolloutRequest], images: list[Any], sampling: Sampling) -> _Share:
        rollout = self.plan.rollout
        return _Share(replica, dealt(requests, rollout.max_tokens, rollout.data_parallel_size), images, sampling)

    def _check_progress(self, shares: list[_Share], doing: str) -> None:
        """A replica that is stopped, or hangs, says nothing. What has come may have waited for a reader, or while another was replaced."""
        import ray

        late = [share for share in shares if time.monotonic() - share.since > self.timeout and not ray.wait(share.pending, timeout=0)[0]]
        if late:
            raise silent([call for share in late for call in share.late()], self.timeout, doing)

    def receive_weights(self, published: Published, policy_version: int) -> None:
        """Returns when every replica has copied the weights."""
        self.slots.turns.take("resharding_to_infer", *published.groups, self)
        self._pushed, self._bare = (published, policy_version), list(self._replicas)
        self._fill()

    def _fill(self) -> None:
        """Gives the weights of the last push to those who have others, or none."""
        while self._bare and self._pushed:
            bare, self._bare = self._bare, []
            published, policy_version = self._pushed
            published.deliver(bare, policy_version, self._survivors)

    def _survivors(self, under_way: UnderWay) -> list[tuple[Replica, list[Any]]]:
        """Their answers to a push. Those who died are replaced."""
        found = []
        for replica, calls in under_way:
            try:
                found.append((replica, answers(calls, self.timeout, DOING)))
            except WorkerDied as death:
                self._replace(replica, death)
        return found

    def _fill_beside_work(self) -> None:
        """In the midst of something, so that no turn is taken: trainers bring back what they send, and then send it off again."""
        if self._bare and self._pushed:
            self._fill()
            for group in self._pushed[0].groups:
                group.rest()

    def take_replaced(self) -> int:
        """Replicas replaced since this was last asked."""
        count, self._replaced_before = self._replaced - self._replaced_before, self._replaced
        return count

    def rest(self) -> None:
        """See Turns."""
        self._all("sleep", "sleep of the rollout engine")

    def phase_reports(self) -> list[PhaseReport]:
        return self._all("phase_report", "memory report")

    def _all(self, verb: str, doing: str) -> list[Any]:
        """Answers of all processes; for a replica that has died its successor answers."""
        found = []
        for replica, calls in [(replica, replica.calls(verb)) for replica in self._replicas]:
            try:
                found += answers(calls, self.timeout, doing)
            except WorkerDied as death:
                found += answers(self._replace(replica, death).calls(verb), self.timeout, doing)
        return found

    def _replace(self, replica: Replica, death: WorkerDied) -> Replica:
        """The new one has no weights yet. Raises WorkerFailed when too many have died, or when it cannot start."""
        if self._replaced == _MAX_REPLACEMENTS:
            raise WorkerFailed(f"{death}; {_MAX_REPLACEMENTS} replicas of this run were replaced before, so it is no accident") from death
        self._replaced += 1
        replica.stop()
        successor = Replica(self.slots, self.plan, replica.number)
        deadline = time.monotonic() + start_bound(self.timeout)
        # A machine that is lost takes trainers, too, and has no place for a successor.
        while successor.is_starting() and time.monotonic() < deadline:
            self.while_waiting("rollout")
        successor.ready()
        self._replicas[replica.number] = successor
        self._bare = [bare for bare in self._bare if bare is not replica] + [successor]
        pids = ", ".join(str(member.pid) for member in successor.members)
        _log.warning("%s; replaced by pid %s (%d of %d)", death, pids, self._replaced, _MAX_REPLACEMENTS)
        return successor
