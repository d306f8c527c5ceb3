"""What the processes that train have in common, whichever network they hold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_mm_rl.platforms.profiling import Tracer
from mindspeed_mm_rl.workers.worker import RankWorker

if TYPE_CHECKING:
    from mindspeed_mm_rl.config.plan import TrainPlan
    from mindspeed_mm_rl.weights.device import Address
    from mindspeed_mm_rl.weights.host import WeightHandle


class TrainWorker(RankWorker, ABC):
    """One process of a group of ranks. A subclass says what it runs, in `new_engine`, and adds its verbs."""

    def __init__(self, plan: TrainPlan, rank: int, world_size: int, **engine_options: bool) -> None:
        super().__init__(rank, world_size, plan.timeout_seconds)
        self.plan, self.engine_options, self.tracer = plan, engine_options, Tracer(plan.trace, rank)

    def start(self, meeting_point: tuple[str, int], *_: Any) -> int:
        """Builds the engine; returns the number of trainable parameters. Further arguments are only waited for."""
        # Imported here: the platform must adapt megatron before it is first imported.
        from mindspeed_mm_rl.platforms import device

        plan = self.plan
        device.set_threads(plan.threads)
        if plan.deterministic:
            device.make_deterministic()
        device.adapt_megatron()
        from mindspeed_mm_rl.engines.megatron import process_groups

        process_groups.initialize(plan, self.rank, self.world_size, self.meet(meeting_point))
        self.engine = self.new_engine()
        self.engine.offload()
        device.reset_peak_memory()
        return sum(p.numel() for network in self.engine.networks for p in network.parameters() if p.requires_grad)

    @abstractmethod
    def new_engine(self) -> Any:
        """Called when the process groups are there."""

    def publish_weights(self, nodes: list[str]) -> WeightHandle | None:
        return self.engine.publish_weights(nodes)

    def send_weights(self, address: Address | None) -> None:
        self.engine.send_weights(address)

    def offload(self) -> None:
        self.engine.offload()

    def save(self, folder: str) -> None:
        self.engine.save(Path(folder))

    def load(self, folder: str) -> None:
        self.engine.load(Path(folder))
