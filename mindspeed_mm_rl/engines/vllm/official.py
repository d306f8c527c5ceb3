"""A backend of our own for the weight-update API that vLLM has from 0.27 on."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from mindspeed_mm_rl.engines.vllm import by_layer
from mindspeed_mm_rl.weights.device import Arrivals
from mindspeed_mm_rl.weights.host import WeightHandle

_BACKEND = "mindspeed_mm_rl"


@dataclass
class _Init(WeightTransferInitInfo):
    pass


@dataclass
class _Update(WeightTransferUpdateInfo):
    source: WeightHandle | Arrivals


class CarriedWeights(WeightTransferEngine[_Init, _Update]):
    """Loads what either carrier brings; layers of which it brings nothing keep their weights."""

    init_info_cls = _Init
    update_info_cls = _Update

    def init_transfer_engine(self, init_info: _Init) -> None:
        pass

    def start_weight_update(self) -> None:
        by_layer.begin(self.model)

    def receive_weights(self, update_info: _Update) -> None:
        by_layer.load(self.model, update_info.source)

    def finish_weight_update(self) -> None:
        by_layer.finish(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


def weight_transfer_config() -> WeightTransferConfig:
    """The engine argument that makes updates possible."""
    if _BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(_BACKEND, CarriedWeights)
    return WeightTransferConfig(backend=_BACKEND)
