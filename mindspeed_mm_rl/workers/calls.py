"""Waiting for workers: all answers, or the one worker that is to blame for their absence.

When one rank of a group dies or raises, the others are stuck in a collective or say that a peer is gone. The first error to arrive is
therefore not the one to tell: a death comes first, then a worker's own exception, then whoever keeps silent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mindspeed_mm_rl.platforms import processes, signals
from mindspeed_mm_rl.workers import failure
from mindspeed_mm_rl.workers.failure import Member, WorkerFailed

_LOOK_SECONDS = 1.0
_GRACE_SECONDS = 3.0
"""After one worker has failed, for the others to say what they know. Waiting longer only delays the message."""
_BEHIND_COLLECTIVES_SECONDS = 5.0
"""Collectives have the same bound and began a little later: the ranks that wait in vain are to say so before the driver gives up."""
_START_SECONDS = 300.0
"""Importing megatron or vLLM from a cold network disk takes minutes, however short a phase of the run may be."""
_SHOWN = 5


@dataclass(frozen=True)
class Call:
    """A question to a worker that is on its way. Example: Call(member, member.actor.update.remote(...), "samples 8, 9")."""

    member: Member
    ref: Any
    about: str = ""
    """What the worker has in hand, for the message when it keeps silent."""


def numbered(what: str, ids: Sequence[int]) -> str:
    """Example: numbered("samples", [8, 9, 10, 11, 12, 13]) == "samples 8, 9, 10, 11, 12, ... (6 in all)"."""
    shown = ", ".join(map(str, ids[:_SHOWN]))
    return f"{what} {shown}" if len(ids) <= _SHOWN else f"{what} {shown}, ... ({len(ids)} in all)"


def start_bound(timeout_seconds: float) -> float:
    """Seconds that a worker may take until it is ready."""
    return max(timeout_seconds, _START_SECONDS)


def answers(
    calls: Sequence[Call],
    timeout_seconds: float,
    doing: str,
    awaited: Sequence[Call] = (),
    while_waiting: Callable[[], None] = lambda: None,
) -> list[Any]:
    """All answers, in the order of the calls. awaited: other calls, whose workers these may be waiting for; while_waiting: called about
    once a second.

    Raises WorkerDied, WorkerFailed (a worker raised, or was silent for too long) or ValueError (a worker refuses what the user asked for).
    """
    import ray

    deadline = time.monotonic() + timeout_seconds + _BEHIND_COLLECTIVES_SECONDS
    pending, got = [call.ref for call in calls], {}
    while pending:
        left = deadline - time.monotonic()
        done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, min(left, _LOOK_SECONDS)))
        signals.let_through()
        if not done:
            while_waiting()
            if left <= 0:
                raise silent([call for call in calls if call.ref in pending] + unanswered(awaited), timeout_seconds, doing)
        for ref in done:
            try:
                got[ref] = ray.get(ref)
            except ray.exceptions.RayError as error:
                raise to_blame(calls, {ref: error}, pending, timeout_seconds, doing, awaited) from error
    return [got[call.ref] for call in calls]


def unanswered(calls: Sequence[Call]) -> list[Call]:
    """As of now."""
    import ray

    return [call for call in calls if not ray.wait([call.ref], timeout=0)[0]]


def to_blame(
    calls: Sequence[Call],
    errors: dict[Any, Exception],
    pending: list[Any],
    timeout_seconds: float,
    doing: str,
    awaited: Sequence[Call] = (),
) -> Exception:
    """What to say when the first of some calls that belong together has failed. errors: what is known, by the refs of their calls; pending:
    refs that have not answered yet."""
    import ray

    deadline = time.monotonic() + _GRACE_SECONDS
    while pending and not any(isinstance(error, ray.exceptions.RayActorError) for error in errors.values()):
        done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            break
        for ref in done:
            try:
                ray.get(ref)
            except ray.exceptions.RayError as error:
                errors[ref] = error
    failures = [(call.member, errors[call.ref]) for call in calls if call.ref in errors]
    for member, error in failures:
        if isinstance(error, ray.exceptions.RayActorError | ray.exceptions.OutOfMemoryError):
            return failure.died(member, doing, error)
    for member, error in failures:
        if not failure.blames_others(own_error(error)):
            return failure.raised(member, doing, own_error(error))
    if pending:
        return silent([call for call in calls if call.ref in pending] + unanswered(awaited), timeout_seconds, doing)
    return failure.raised(failures[0][0], doing, own_error(failures[0][1]))


def own_error(error: BaseException) -> BaseException:
    """What the worker raised, without Ray's wrapping."""
    return getattr(error, "cause", None) or error


def silent(calls: Sequence[Call], timeout_seconds: float, doing: str) -> WorkerFailed:
    """Names who did not answer, those alone that are stopped where that is known, and what they have in hand."""
    stopped = [call for call in calls if call.member.is_local and processes.is_stopped(call.member.pid)]
    told = "; ".join(
        f"{call.member}{', which is stopped (SIGSTOP)' if call in stopped else ''}{f', with {call.about}' if call.about else ''}"
        for call in stopped or calls
    )
    return WorkerFailed(f"{doing} waits in vain: no answer within {timeout_seconds:g} s (rl_config.timeout_seconds) from {told}")


def failed(member: Member, doing: str, error: BaseException) -> Exception:
    """What Ray raised for one worker, as a sentence of ours."""
    import ray

    if isinstance(error, ray.exceptions.RayActorError | ray.exceptions.OutOfMemoryError):
        return failure.died(member, doing, error)
    return failure.raised(member, doing, own_error(error))


class Pulse:
    """Whether idle workers are still alive, asked without waiting: their deaths are otherwise seen only when they are needed again."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self._asked: dict[int, Any] = {}

    def check(self, doing: str) -> None:
        """Raises WorkerDied."""
        import ray

        for index, member in enumerate(self.members):
            ref = self._asked.get(index)
            if ref is None:
                self._asked[index] = member.actor.alive.remote()
            elif ray.wait([ref], timeout=0)[0]:
                del self._asked[index]
                try:
                    ray.get(ref)
                except ray.exceptions.RayError as error:
                    raise failed(member, doing, error) from error
