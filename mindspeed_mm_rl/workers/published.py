"""Weights that trainers have for rollout replicas, and how they get there.

host    trainers write a file on every node --------------------> replicas read it, whenever they like until the next push
device  replicas open an inbox --where--> trainers send by chunks, all at the same time, to whoever reads; a later reader is sent them again
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mindspeed_mm_rl.weights.host import NodeHandles, joined
from mindspeed_mm_rl.workers.calls import Call, answers

if TYPE_CHECKING:
    from mindspeed_mm_rl.workers.group import TrainGroup
    from mindspeed_mm_rl.workers.replicas import Replica

UnderWay = Sequence[tuple["Replica", list[Call]]]
Survivors = Callable[[UnderWay], list[tuple["Replica", list[Any]]]]
"""Waits; the answers of the replicas that did not die meanwhile."""
DOING = "weight push"


class Published(Protocol):
    groups: tuple[TrainGroup, ...]
    """Who works while it is delivered."""

    def deliver(self, replicas: Sequence[Replica], policy_version: int, survivors: Survivors) -> None:
        """Returns when each of the replicas has copied the weights, or has died. The weights must be those of `policy_version` still."""


@dataclass(frozen=True)
class OnHosts:
    handles: NodeHandles
    groups: tuple[TrainGroup, ...] = ()

    def deliver(self, replicas: Sequence[Replica], policy_version: int, survivors: Survivors) -> None:
        survivors([(replica, replica.receive_weights(self.handles, policy_version)) for replica in replicas])


@dataclass(frozen=True)
class OnDevices:
    groups: tuple[TrainGroup, ...]

    def deliver(self, replicas: Sequence[Replica], policy_version: int, survivors: Survivors) -> None:
        opened = survivors([(replica, replica.calls("open_inbox")) for replica in replicas])
        inboxes = {slot: inbox for replica, found in opened for slot, inbox in zip(replica.places, found, strict=True)}
        if not inboxes:
            return
        receiving = [(replica, replica.calls("empty_inbox", len(self.groups), policy_version)) for replica, _ in opened]
        sending = [call for group in self.groups for call in group.send_weights(inboxes)]
        # Of the trainers first: when one is gone a reader says so too, and it isn't the reader's fault.
        answers(sending, self.groups[0].timeout, DOING, [call for _, calls in receiving for call in calls])
        survivors(receiving)


def publish(carrier: str, *groups: TrainGroup) -> Published:
    """groups: each trains a part of the model."""
    return OnDevices(groups) if carrier == "device" else OnHosts(joined(*(group.written_weights() for group in groups)))
