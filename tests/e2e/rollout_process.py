"""A process of its own for vLLM engines, as in a run: vLLM changes thread counts and random state of the process that it lives in."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import TracebackType

import pytest

from mindspeed_mm_rl.config.plan import RolloutPlan
from mindspeed_mm_rl.engines.vllm.environment import rollout_env
from mindspeed_mm_rl.types import Images, RolloutGroup, RolloutRequest, Sampling
from mindspeed_mm_rl.weights.host import WeightHandle

_engines: dict = {}
"""Of the child process."""


def _ready() -> None:
    pass


def _join(address: str, rank: int, size: int) -> None:
    from torch.distributed import TCPStore

    from mindspeed_mm_rl.engines.vllm import ranks

    host, port = address.split(":")
    ranks.join(TCPStore(host, int(port), size, is_master=rank == 0, wait_for_workers=False), rank, size, timeout_seconds=60.0)


def _build(name: str, plan: RolloutPlan, seed: int) -> None:
    from mindspeed_mm_rl.engines.vllm.engine import VllmRolloutEngine

    _engines[name] = VllmRolloutEngine(plan, seed)


def _close(name: str) -> None:
    _engines.pop(name).close()


def _receive(name: str, handle: WeightHandle, version: int) -> None:
    _engines[name].receive_weights(handle, version)


def _sleep(name: str) -> None:
    _engines[name].sleep()


def _seconds(name: str) -> dict[str, float]:
    return _engines[name].take_seconds()


def _generate(name: str, requests: list[RolloutRequest], images: Images, num_samples: int) -> list[RolloutGroup]:
    return list(_engines[name].generate(requests, images, Sampling(num_samples)))


def _generate_while_open(
    name: str, requests: list[RolloutRequest], images: Images, num_samples: int
) -> tuple[list[str], list[RolloutGroup]]:
    """Reads one group, asks for another stream and for new weights, closes the stream, reads a new one to its end."""
    engine, refusals = _engines[name], []
    stream = engine.generate(requests, images, Sampling(num_samples))
    next(stream)
    for intrusion in (lambda: next(engine.generate(requests, images, Sampling(num_samples))), lambda: engine.receive_weights(None, 9)):
        try:
            intrusion()
        except ValueError as error:
            refusals.append(str(error))
    stream.close()
    return refusals, _generate(name, requests, images, num_samples)


class RolloutProcess:
    """Calls answer when they are done; errors of the child are raised here."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def __enter__(self) -> RolloutProcess:
        with pytest.MonkeyPatch.context() as environment:
            # An empty cache: what only works on a machine that has run vLLM before would fail here.
            for key, value in (rollout_env(threads=1) | {"VLLM_CACHE_ROOT": str(self._cache)}).items():
                environment.setenv(key, value)
            self._pool.submit(_ready).result()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def pid(self) -> int:
        return self._pool.submit(os.getpid).result()

    def join(self, address: str, rank: int, size: int) -> None:
        """Before `build` of an engine that is spread over `size` processes."""
        self._pool.submit(_join, address, rank, size).result()

    def build(self, name: str, plan: RolloutPlan, seed: int) -> None:
        self._pool.submit(_build, name, plan, seed).result()

    def close(self, name: str) -> None:
        self._pool.submit(_close, name).result()

    def receive(self, name: str, handle: WeightHandle, version: int) -> None:
        self._pool.submit(_receive, name, handle, version).result()

    def sleep(self, name: str) -> None:
        self._pool.submit(_sleep, name).result()

    def take_seconds(self, name: str) -> dict[str, float]:
        return self._pool.submit(_seconds, name).result()

    def generate(self, name: str, requests: list[RolloutRequest], images: Images, num_samples: int) -> list[RolloutGroup]:
        return self._pool.submit(_generate, name, requests, images, num_samples).result()

    def generate_while_open(
        self, name: str, requests: list[RolloutRequest], images: Images, num_samples: int
    ) -> tuple[list[str], list[RolloutGroup]]:
        return self._pool.submit(_generate_while_open, name, requests, images, num_samples).result()
