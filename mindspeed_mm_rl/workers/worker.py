"""What every worker process has, whatever engine it runs."""

from __future__ import annotations

import os
from typing import Any


class Worker:
    """A subclass keeps its arguments and builds its engine in `start`, so that a worker can say who it is before that, which is long
    and may fail, and an exception of it arrives as it was raised."""

    def alive(self) -> tuple[int, str]:
        """Process id and node."""
        import ray

        return os.getpid(), ray.util.get_node_ip_address()

    def peak_memory(self) -> int:
        """Bytes."""
        from mindspeed_mm_rl.platforms import device

        return device.peak_memory_bytes()


def fetched(images: list[Any]) -> dict[str, Any]:
    """Object refs of picture tables -> one table; arrays are mapped from the object store, not copied."""
    import ray

    return {key: image for table in ray.get(images) for key, image in table.items()}
