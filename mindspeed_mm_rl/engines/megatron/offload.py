"""An engine's state, in parts that leave the device while nobody needs them.

    hold("param") --> other parts that may leave: device --copy, memory freed--> host;   param: host --copy--> device, if it had left

What is freed and filled again is the storage under a tensor, so every tensor that looks into it (a parameter in a DDP buffer, its
main_grad, an optimizer's shard of it) is whole again when it comes back, at whatever address.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from mindspeed_mm_rl.config.plan import OffloadPart
from mindspeed_mm_rl.platforms import device

Tensors = Callable[[], Iterable[torch.Tensor]]
"""The tensors of a part as they are now: an optimizer has no moments before its first step."""

_BLOCK_BYTES = 256 << 20
"""Pinned memory comes in powers of two, whatever is asked for: large blocks of such a size waste nothing."""
_ALIGNMENT_BYTES = 512


class HostMemory:
    """One range of bytes for everything that leaves together."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._blocks = [device.host_memory(min(_BLOCK_BYTES, num_bytes - start)) for start in range(0, num_bytes, _BLOCK_BYTES)]

    def pieces(self, start: int, num_bytes: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Memory for bytes from `start` on: (offset from start, uint8 view), a view in each block."""
        done = 0
        while done < num_bytes:
            block, offset = divmod(start + done, _BLOCK_BYTES)
            view = self._blocks[block][offset : offset + num_bytes - done]
            yield done, view
            done += len(view)


class _Part:
    """Parameters, or whatever leaves and comes together."""

    def __init__(self, tensors: Tensors, is_kept: bool) -> None:
        """is_kept: whether what is in it is needed when it comes back."""
        self.tensors, self.is_kept = tensors, is_kept
        self.is_away = self.is_copied = False
        self._storages: list[tuple[torch.UntypedStorage, int, int]] = []
        """(storage, its bytes, where they begin on the host)"""
        self._host: HostMemory | None = None

    def copy(self, storages: Sequence[torch.UntypedStorage]) -> None:
        """To the host, unless it is there as it is. The copies are on their way when this returns."""
        if self.is_copied:
            return
        self._storages, end = [], 0
        for storage in storages:
            self._storages.append((storage, storage.nbytes(), end))
            end += -(-storage.nbytes() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if not self.is_kept:
            return
        if self._host is None or self._host.num_bytes != end:
            self._host = None
            self._host = HostMemory(end)
        for on_device, on_host in self._pairs():
            on_host.copy_(on_device, non_blocking=True)
        self.is_copied = True

    def free(self) -> None:
        for storage, _, _ in self._storages:
            storage.resize_(0)
        self.is_away = True

    def come(self) -> None:
        """Whoever uses it on the device's current stream finds it whole: the copies are before him on it."""
        for storage, num_bytes, _ in self._storages:
            storage.resize_(num_bytes)
        if self.is_kept:
            for on_device, on_host in self._pairs():
                on_device.copy_(on_host, non_blocking=True)
        self.is_away = False

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for storage, num_bytes, start in self._storages:
            whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            for offset, on_host in self._host.pieces(start, num_bytes):
                yield whole[offset : offset + len(on_host)], on_host


class OffloadedState:
    def __init__(
        self, may_leave: Sequence[OffloadPart], parts: Mapping[OffloadPart, Tensors], before_leaving: Callable[[], None] = lambda: None
    ) -> None:
        """parts: a storage of two of them belongs to the first. before_leaving: makes parameters whole that other ranks are sending."""
        self._parts = {name: _Part(tensors, is_kept=name != "grad") for name, tensors in parts.items()}
        self._may_leave, self._before_leaving = set(may_leave), before_leaving
        self._seconds: dict[str, float] = {}

    def hold(self, *wanted: OffloadPart) -> None:
        """These are on the device from now on; others are not, as far as they may leave."""
        leaving = [name for name, part in self._parts.items() if name in self._may_leave - set(wanted) and not part.is_away]
        if leaving:
            self._leave(leaving)
        for name in wanted:
            if self._parts[name].is_away:
                start = time.perf_counter()
                self._parts[name].come()
                self._count("onload", name, start)
        if "optimizer" in wanted:
            # Nobody else changes anything: until then the copy on the host is as good.
            for name in wanted:
                self._parts[name].is_copied = False

    def take_seconds(self) -> dict[str, float]:
        """What leaving and coming took since this was last asked, by the names of their timing metrics."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _leave(self, names: Sequence[OffloadPart]) -> None:
        if "param" in names and not self._parts["param"].is_copied:
            self._before_leaving()
        storages = self._storages()
        for name in names:
            start = time.perf_counter()
            self._parts[name].copy(storages[name])
            device.synchronize()
            self._parts[name].free()
            self._count("offload", name, start)
        device.empty_cache()

    def _storages(self) -> dict[OffloadPart, list[torch.UntypedStorage]]:
        """Of every part, those that are on the device."""
        here, seen, found = device.current().type, set(), {}
        for name, part in self._parts.items():
            found[name] = []
            for tensor in part.tensors():
                storage = tensor.untyped_storage()
                if tensor.device.type == here and storage.nbytes() and storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    found[name].append(storage)
        return found

    def _count(self, what: str, name: OffloadPart, start: float) -> None:
        key = f"ref_{what}" if name == "reference" else what
        self._seconds[key] = self._seconds.get(key, 0.0) + time.perf_counter() - start


def network_tensors(networks: Sequence[torch.nn.Module]) -> Iterator[torch.Tensor]:
    for network in networks:
        yield from network.parameters()
        yield from network.buffers()


def gradient_tensors(models: Sequence[Any]) -> Iterator[torch.Tensor]:
    """models: megatron's DDP around networks."""
    return (buffer.grad_data for model in models for buffer in (*model.buffers, *model.expert_parallel_buffers))


def optimizer_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    """float32 copies of the weights, or this rank's shards of them, and Adam's moments."""
    for part in optimizer.chained_optimizers:
        # One that has nothing to train has no optimizer inside.
        if part.optimizer is not None:
            yield from (parameter for group in part.optimizer.param_groups for parameter in group["params"])
            yield from (value for state in part.optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor))
