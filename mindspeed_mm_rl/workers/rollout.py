"""Ray binding of the rollout engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mindspeed_mm_rl.workers.worker import Worker, fetched

if TYPE_CHECKING:
    from mindspeed_mm_rl.config.plan import RolloutPlan
    from mindspeed_mm_rl.types import RolloutGroup, RolloutRequest, Sampling
    from mindspeed_mm_rl.weights.host import WeightHandle


class RolloutWorker(Worker):
    """One rollout replica; a generator method streams each group as soon as it is finished."""

    def __init__(self, plan: RolloutPlan, seed: int) -> None:
        self.plan, self.seed = plan, seed

    def start(self) -> None:
        from mindspeed_mm_rl.engines.vllm.engine import VllmRolloutEngine

        self.engine = VllmRolloutEngine(self.plan, self.seed)

    def generate(self, requests: list[RolloutRequest], images: list[Any], sampling: Sampling) -> Iterator[RolloutGroup]:
        """images: object refs of picture tables."""
        yield from self.engine.generate(requests, fetched(images), sampling)

    def receive_weights(self, handle: WeightHandle, policy_version: int) -> None:
        self.engine.receive_weights(handle, policy_version)
