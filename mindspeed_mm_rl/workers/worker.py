"""What every worker process has, whatever engine it runs."""

from __future__ import annotations

import datetime
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from mindspeed_mm_rl.types import PhaseReport


class Worker:
    """A subclass keeps its arguments and builds its engine in `start`, so that a worker can say who it is before that, which is long
    and may fail, and an exception of it arrives as it was raised."""

    engine: Any

    def alive(self) -> tuple[int, str]:
        """Process id and node."""
        import ray

        return os.getpid(), ray.util.get_node_ip_address()

    def phase_report(self) -> PhaseReport:
        """Since the last one."""
        from mindspeed_mm_rl.platforms import device
        from mindspeed_mm_rl.types import PhaseReport

        report = PhaseReport(device.peak_memory_bytes(), self.engine.take_seconds())
        device.reset_peak_memory()
        return report


class RankWorker(Worker):
    """One of the processes that make up a group; before they begin they meet at a store of rank 0."""

    def __init__(self, rank: int, world_size: int, timeout_seconds: float) -> None:
        self.rank, self.world_size, self.timeout_seconds = rank, world_size, timeout_seconds
        self.store: TCPStore | None = None

    def meeting_point(self) -> tuple[str, int]:
        """Rank 0's: where the group meets. It listens from now on, for a port that is only found free may be taken the next moment."""
        import ray

        self.store = self._open_store(ray.util.get_node_ip_address(), 0, is_master=True)
        return self.store.host, self.store.port

    def meet(self, meeting_point: tuple[str, int]) -> TCPStore:
        """The store for init_process_group. All ranks with a store: it names its keys otherwise than an address does, and they would wait
        for each other."""
        self.store = self.store or self._open_store(*meeting_point, is_master=False)
        return self.store

    def _open_store(self, host: str, port: int, is_master: bool) -> TCPStore:
        from torch.distributed import TCPStore

        timeout = datetime.timedelta(seconds=self.timeout_seconds)
        return TCPStore(host, port, self.world_size, is_master, timeout=timeout, wait_for_workers=False)


def fetched(images: list[Any]) -> dict[str, Any]:
    """Object refs of picture tables -> one table; arrays are mapped from the object store, not copied."""
    import ray

    return {key: image for table in ray.get(images) for key, image in table.items()}
