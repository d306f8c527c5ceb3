"""Worker processes with a planted fault, and one that watches: what a run does when trainer and rollout engine silently part."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm_rl.weights.host import Views, WeightHandle, open_views
from mindspeed_mm_rl.workers.actor import ActorWorker
from mindspeed_mm_rl.workers.critic import CriticWorker
from mindspeed_mm_rl.workers.rollout import RolloutWorker
from tests.host_weights import fill, new_buffer

WITNESS = "PLANTED_WITNESS"
"""Environment variable of the workers: the file in which WatchedActor says what it saw."""
HALT = "PLANTED_HALT"
"""Environment variable of the workers: the file that tells HaltingRollout to stop, and DyingRollout to die."""
PERTURBED = "model.layers.1.mlp.down_proj.weight"


class PerturbedRollout(RolloutWorker):
    """From the second push on, one tensor of one layer is not the trainer's; the trainer's own buffer stays as it is."""

    def receive_weights(self, handle: WeightHandle, policy_version: int) -> None:
        super().receive_weights(handle if policy_version == 0 else self._perturbed(handle), policy_version)

    def _perturbed(self, handle: WeightHandle) -> WeightHandle:
        tensors = [(name, view * 3 if name == PERTURBED else view) for name, view in open_views(handle)]
        assert PERTURBED in dict(tensors)
        self.buffer = new_buffer(tensors)
        return fill(self.buffer, tensors)


class StaleCacheRollout(RolloutWorker):
    """From the third push on, keys and values of the old weights are kept: the reset says that it was done, and wasn't.

    An engine that sleeps forgets them too, so this one stays awake.
    """

    def sleep(self) -> None:
        pass

    def receive_weights(self, handle: WeightHandle, policy_version: int) -> None:
        if policy_version == 2:
            self.engine._llm.reset_prefix_cache = lambda: True
        super().receive_weights(handle, policy_version)


class SmallChunksActor(ActorWorker):
    """Sends weights through the device in so small parts that layers are torn apart."""

    def new_engine(self) -> Any:
        engine = super().new_engine()
        engine.chunk_bytes = 40_000
        return engine


class HaltingRollout(RolloutWorker):
    """The rank whose number stands in the file HALT stops at the second chunk of a push, and removes the file."""

    def empty_inbox(self, senders: int, policy_version: int) -> None:
        from mindspeed_mm_rl.weights.device import Arrivals

        file, chunks = Path(os.environ[HALT]), Arrivals.chunks

        def halting(arrivals: Arrivals) -> Iterator[Views]:
            for number, views in enumerate(chunks(arrivals)):
                if number == 1 and file.exists() and file.read_text() == str(self.rank):
                    file.unlink()
                    os.kill(os.getpid(), signal.SIGSTOP)
                yield views

        Arrivals.chunks = halting
        try:
            super().empty_inbox(senders, policy_version)
        finally:
            Arrivals.chunks = chunks


class DyingRollout(RolloutWorker):
    """The first one that gets weights while the file HALT is there removes the file and dies."""

    def receive_weights(self, handle: WeightHandle, policy_version: int) -> None:
        try:
            Path(os.environ[HALT]).unlink()
        except FileNotFoundError:
            super().receive_weights(handle, policy_version)
        else:
            os.kill(os.getpid(), signal.SIGKILL)


class DyingCritic(CriticWorker):
    def values(self, *arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class WatchedActor(ActorWorker):
    """Writes down weights and optimizer state before and after an update that raises."""

    def update(self, *arguments: object) -> dict[str, float]:
        before = self._digest()
        try:
            return super().update(*arguments)
        except RuntimeError:
            Path(os.environ[WITNESS]).write_text(json.dumps({"before": before, "after": self._digest()}))
            raise

    def _digest(self) -> str:
        digest = hashlib.sha256(str(self.engine.schedule.num_steps).encode())
        for tensor in self._tensors():
            digest.update(tensor.detach().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from self.engine.policy.parameters()
        for state in self.engine.optimizer.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))
