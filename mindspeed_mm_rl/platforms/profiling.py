"""Traces of what a process does, for Perfetto or chrome://tracing, by the profiler of its device."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TraceSettings:
    """Example: TraceSettings("logs/profile", ("actor_update",), first_call=1, end_call=2, ranks=(0,))."""

    folder: str
    stages: tuple[str, ...]
    first_call: int
    """Of each stage, counted from 1."""
    end_call: int
    """The first that is traced no more."""
    ranks: tuple[int, ...] | None = None
    """None: all."""
    host: bool = True
    device: bool = True
    memory: bool = False
    shapes: bool = False
    modules: bool = False


class Tracer:
    """Writes folder/STAGE_CALL_rankRANK.json for every call of a stage that the settings choose."""

    def __init__(self, settings: TraceSettings | None, rank: int) -> None:
        self.settings, self.rank = settings, rank
        self.calls: Counter[str] = Counter()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.calls[name] += 1
        if self.settings is None or not self._chosen(self.settings, name):
            yield
            return
        from mindspeed_mm_rl.platforms import device

        with _profile(self.settings) as profile:
            yield
            device.synchronize()
        file = Path(self.settings.folder, f"{name}_{self.calls[name]}_rank{self.rank}.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(file))

    def _chosen(self, settings: TraceSettings, name: str) -> bool:
        is_own = settings.ranks is None or self.rank in settings.ranks
        return is_own and name in settings.stages and settings.first_call <= self.calls[name] < settings.end_call


def _profile(settings: TraceSettings) -> Any:
    from mindspeed_mm_rl.platforms import device

    if device.kind() == "npu":
        from torch_npu.profiler import ProfilerActivity, profile

        own = [ProfilerActivity.NPU]
    else:
        from torch.profiler import ProfilerActivity, profile

        own = [ProfilerActivity.CUDA] if device.kind() == "cuda" else []
    host = [ProfilerActivity.CPU] if settings.host or not own else []
    return profile(
        activities=host + (own if settings.device else []),
        profile_memory=settings.memory,
        record_shapes=settings.shapes,
        with_modules=settings.modules,
    )
