"""A network whose weights go to rollout engines: by a file in the host's memory, or through memory of the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from mindspeed_mm_rl.engines.megatron.network import NetworkEngine
from mindspeed_mm_rl.models.names import Entry, Shape
from mindspeed_mm_rl.models.placement import Piece
from mindspeed_mm_rl.weights.device import CHUNK_BYTES, Address, DevicePush
from mindspeed_mm_rl.weights.host import WeightHandle
from mindspeed_mm_rl.weights.push import WeightPush, Weights


class PublishingEngine(NetworkEngine, ABC):
    """Implements engines.base.Publishes."""

    chunk_bytes = CHUNK_BYTES
    _host: WeightPush | None = None
    _device: DevicePush | None = None

    @abstractmethod
    def published(self) -> tuple[Sequence[Sequence[Piece]], Iterable[Entry]]:
        """What this rank holds of what is published, by network; and all of it."""

    def publish_weights(self, nodes: Sequence[str] = ()) -> WeightHandle | None:
        """On all ranks at once; see WeightPush.publish. nodes: of all ranks, () = one for all."""
        weights = self._current()
        self._host = self._host or WeightPush(*self._what(weights), nodes)
        return self._host.publish(weights)

    def send_weights(self, address: Address | None) -> None:
        """On all ranks at once; see DevicePush.send."""
        weights = self._current()
        self._device = self._device or DevicePush(*self._what(weights), self.chunk_bytes)
        self._device.send(weights, address)

    def _current(self) -> Weights:
        self.state.hold("param")
        self.whole_parameters()
        return [network.weights() for network in self.networks]

    def _what(self, weights: Weights) -> tuple[Sequence[Sequence[Piece]], Weights, dict[str, Shape]]:
        pieces, table = self.published()
        return pieces, weights, {name: shape for entry in table for name, shape in zip(entry.hf, entry.hf_shapes, strict=True)}
