"""What the processes that train have in common, whichever network they hold."""

from __future__ import annotations

import datetime
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_mm_rl.workers.worker import Worker

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from mindspeed_mm_rl.config.plan import TrainPlan


class TrainWorker(Worker, ABC):
    """One process of a group of ranks. A subclass says what it runs, in `new_engine`, and adds its verbs."""

    def __init__(self, plan: TrainPlan, rank: int, world_size: int, **engine_options: bool) -> None:
        self.plan, self.rank, self.world_size, self.engine_options = plan, rank, world_size, engine_options
        self.store: TCPStore | None = None

    def meeting_point(self) -> tuple[str, int]:
        """Rank 0's: where the group meets. It listens from now on, for a port that is only found free may be taken the next moment."""
        import ray

        self.store = self._meet(ray.util.get_node_ip_address(), 0, is_master=True)
        return self.store.host, self.store.port

    def _meet(self, host: str, port: int, is_master: bool) -> TCPStore:
        from torch.distributed import TCPStore

        timeout = datetime.timedelta(seconds=self.plan.timeout_seconds)
        return TCPStore(host, port, self.world_size, is_master, timeout=timeout, wait_for_workers=False)

    def start(self, meeting_point: tuple[str, int]) -> int:
        """Builds the engine; returns the number of trainable parameters."""
        # Imported here: the platform must adapt megatron before it is first imported.
        from mindspeed_mm_rl.platforms import device

        plan = self.plan
        device.set_threads(plan.threads)
        if plan.deterministic:
            device.make_deterministic()
        device.adapt_megatron()
        from mindspeed_mm_rl.engines.megatron import process_groups

        # All ranks with a store: it names its keys otherwise than an address does, and they would wait for each other.
        self.store = self.store or self._meet(*meeting_point, is_master=False)
        process_groups.initialize(plan, self.rank, self.world_size, self.store)
        self.engine = self.new_engine()
        return sum(p.numel() for network in self.engine.networks for p in network.parameters() if p.requires_grad)

    @abstractmethod
    def new_engine(self) -> Any:
        """Called when the process groups are there."""

    def save(self, folder: str) -> None:
        self.engine.save(Path(folder))

    def load(self, folder: str) -> None:
        self.engine.load(Path(folder))
