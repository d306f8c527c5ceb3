"""Ray binding of the rollout engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mindspeed_mm_rl.workers.worker import RankWorker, fetched

if TYPE_CHECKING:
    from mindspeed_mm_rl.config.plan import RolloutPlan
    from mindspeed_mm_rl.types import RolloutGroup, RolloutRequest, Sampling
    from mindspeed_mm_rl.weights.device import Address
    from mindspeed_mm_rl.weights.host import WeightHandle


class RolloutWorker(RankWorker):
    """One process of a rollout replica. The first of each tensor-parallel group streams groups of samples as they are finished; the others
    keep pace."""

    def __init__(self, plan: RolloutPlan, seed: int, rank: int = 0) -> None:
        super().__init__(rank, plan.num_ranks, plan.timeout_seconds)
        self.plan, self.seed = plan, seed

    def start(self, meeting_point: tuple[str, int] | None, *_: Any) -> None:
        """meeting_point: None for a replica of one process. Further arguments are only waited for."""
        from mindspeed_mm_rl.engines.vllm import ranks
        from mindspeed_mm_rl.engines.vllm.engine import VllmRolloutEngine

        if meeting_point is not None:
            ranks.join(self.meet(meeting_point), self.rank, self.world_size, self.timeout_seconds)
        self.engine = VllmRolloutEngine(self.plan, self.seed)

    def sleep(self) -> None:
        self.engine.sleep()

    def generate(self, requests: list[RolloutRequest], images: list[Any], sampling: Sampling) -> Iterator[RolloutGroup]:
        """images: object refs of picture tables."""
        yield from self.engine.generate(requests, fetched(images), sampling)

    def keep_pace(self, requests: list[RolloutRequest], images: list[Any], sampling: Sampling) -> None:
        """The same on the other ranks of a tensor-parallel group, with the same arguments."""
        for _ in self.engine.generate(requests, fetched(images), sampling):
            pass

    def receive_weights(self, handle: WeightHandle, policy_version: int) -> None:
        self.engine.receive_weights(handle, policy_version)

    def open_inbox(self) -> Address:
        """For one push of those who train on this device."""
        from mindspeed_mm_rl.weights.device import Inbox

        self.inbox = Inbox()
        return self.inbox.address

    def empty_inbox(self, senders: int, policy_version: int) -> None:
        """While so many of them send, each a part of the model."""
        with self.inbox.accepted(senders) as arrivals:
            self.engine.receive_weights(arrivals, policy_version)
