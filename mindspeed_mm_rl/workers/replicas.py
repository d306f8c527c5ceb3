"""The rollout processes as one object that the driver talks to. A replica that dies is replaced, and what it had in hand is done again.

dead stream -> new process on the same bundle -> weights of the last push (the trainer's buffer still holds them)
            -> its unfinished prompts again: the noise of a sample depends on its id alone, so the tokens are the same
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.engines.vllm.environment import rollout_env
from mindspeed_mm_rl.platforms import signals
from mindspeed_mm_rl.types import RolloutGroup, RolloutRequest, Sampling
from mindspeed_mm_rl.weights.host import WeightHandle
from mindspeed_mm_rl.workers import placement
from mindspeed_mm_rl.workers.calls import Call, answers, failed, numbered, silent, start_bound
from mindspeed_mm_rl.workers.failure import Member, WorkerDied, WorkerFailed
from mindspeed_mm_rl.workers.rollout import RolloutWorker

_ROLE = "rollout replica"
_MAX_REPLACEMENTS = 3
"""Of a whole run: more than that is no accident, and a process that dies at every start would be replaced for ever."""
_LOOK_SECONDS = 1.0
_log = logging.getLogger(__name__)


@dataclass
class _Share:
    """What one replica has in hand."""

    replica: int
    unfinished: dict[int, RolloutRequest]
    since: float = field(default_factory=time.monotonic)
    """When it last finished a group, or began."""


class RolloutGroupStream:
    """All rollout replicas. Prompts are dealt in turn; finished groups are merged as they come."""

    def __init__(self, slots: placement.Slots, plan: Plan) -> None:
        """Starts the processes and does not wait for them; `ready` does."""
        self.slots, self.plan, self.timeout = slots, plan, plan.run.timeout_seconds
        self._training = Sampling(plan.run.samples_per_prompt)
        self.workers = [self._spawn(slot) for slot in range(0, slots.count, plan.rollout.tensor_parallel_size)]
        self._greetings = [worker.alive.remote() for worker in self.workers]
        self._started = [worker.start.remote() for worker in self.workers]
        self.members: list[Member] = []
        self.while_waiting: Callable[[str], None] = lambda doing: None
        """Called about once a second while groups are awaited, with what is going on: a look at those who are idle meanwhile."""
        self._pushed: tuple[WeightHandle, int] | None = None
        self._replaced = self._replaced_before = 0

    def ready(self) -> None:
        self.members = placement.introduced(_ROLE, self.workers, self._greetings, self.slots)
        calls = [Call(member, ref) for member, ref in zip(self.members, self._started, strict=True)]
        answers(calls, start_bound(self.timeout), "start of the rollout engine")

    def generate(self, requests: list[RolloutRequest], images: list[Any], sampling: Sampling | None = None) -> Iterator[RolloutGroup]:
        """Yields groups in finish order. sampling: other than training's.

        Raises WorkerFailed, naming replica and prompts, when a replica finishes nothing within the bound or too many have died.
        """
        import ray

        sampling = sampling or self._training
        doing = sampling.stream or "rollout"
        shares = [{r.prompt_id: r for r in requests[i :: len(self.members)]} for i in range(len(self.members))]
        streams = {self._ask(i, share, images, sampling): _Share(i, share) for i, share in enumerate(shares) if share}
        while streams:
            done, _ = ray.wait(list(streams), num_returns=1, timeout=_LOOK_SECONDS)
            signals.let_through()
            for stream in done:
                share = streams[stream]
                try:
                    group = self._next(stream, share, doing)
                except WorkerDied as death:
                    del streams[stream]
                    self._replace(share.replica, death)
                    if share.unfinished:
                        streams[self._ask(share.replica, share.unfinished, images, sampling)] = _Share(share.replica, share.unfinished)
                    continue
                if group is None:
                    del streams[stream]
                else:
                    yield group
            self.while_waiting(doing)
            self._check_progress(streams, doing)

    def _ask(self, replica: int, requests: dict[int, RolloutRequest], images: list[Any], sampling: Sampling) -> Any:
        generate = self.members[replica].actor.generate.options(num_returns="streaming")
        return generate.remote(list(requests.values()), images, sampling)

    def _next(self, stream: Any, share: _Share, doing: str) -> RolloutGroup | None:
        """The next group of a stream; None at its end."""
        import ray

        member = self.members[share.replica]
        try:
            ref = next(stream, None)
            group = None if ref is None else ray.get(ref)
        except ray.exceptions.RayError as error:
            raise failed(member, doing, error) from error
        if group is None:
            if share.unfinished:
                raise WorkerFailed(f"{member} ended its stream without {numbered('prompts', sorted(share.unfinished))}")
            return None
        del share.unfinished[group.prompt_id]
        share.since = time.monotonic()
        return group

    def _check_progress(self, streams: dict[Any, _Share], doing: str) -> None:
        """A replica that is stopped, or hangs, says nothing."""
        late = [share for share in streams.values() if time.monotonic() - share.since > self.timeout]
        if late:
            calls = [Call(self.members[s.replica], None, f"{numbered('prompts', sorted(s.unfinished))} unfinished") for s in late]
            raise silent(calls, self.timeout, doing)

    def receive_weights(self, handle: WeightHandle, policy_version: int) -> None:
        """Returns when every replica has copied the weights."""
        self._pushed = (handle, policy_version)
        calls = [Call(member, member.actor.receive_weights.remote(handle, policy_version)) for member in self.members]
        for replica, call in enumerate(calls):
            try:
                answers([call], self.timeout, "weight push")
            except WorkerDied as death:
                self._replace(replica, death)

    def take_replaced(self) -> int:
        """Replicas replaced since this was last asked."""
        count, self._replaced_before = self._replaced - self._replaced_before, self._replaced
        return count

    def peak_memory(self) -> int:
        calls = [Call(member, member.actor.peak_memory.remote()) for member in self.members]
        return sum(answers(calls, self.timeout, "memory report"))

    def _spawn(self, slot: int) -> Any:
        variables = dict(self.plan.runtime_env) | rollout_env(self.plan.rollout.threads)
        return placement.spawn(self.slots, RolloutWorker, slot, variables, plan=self.plan.rollout, seed=self.plan.rollout.seed)

    def _replace(self, replica: int, death: WorkerDied) -> None:
        """Raises WorkerFailed when too many have died, or when the new one cannot start."""
        if self._replaced == _MAX_REPLACEMENTS:
            raise WorkerFailed(f"{death}; {_MAX_REPLACEMENTS} replicas of this run were replaced before, so it is no accident") from death
        self._replaced += 1
        worker = self._spawn(replica * self.plan.rollout.tensor_parallel_size)
        greeting, started = worker.alive.remote(), worker.start.remote()
        member = replace(placement.introduced(_ROLE, [worker], [greeting], self.slots)[0], number=replica)
        answers([Call(member, started)], start_bound(self.timeout), "start of the rollout engine")
        if self._pushed is not None:
            answers([Call(member, worker.receive_weights.remote(*self._pushed))], self.timeout, "weight push")
        self.workers[replica] = worker
        self.members[replica] = member
        _log.warning("%s; replaced by pid %d (%d of %d)", death, member.pid, self._replaced, _MAX_REPLACEMENTS)
