"""New weights into a running vLLM engine by its weight-update API, with a backend of our own.

The only file, beside patches/vllm_*.py, that touches vLLM's private parts.

    start_weight_update -> update_weights (maps the trainer's memory, loads from it) -> finish_weight_update -> caches reset
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from vllm import LLM
from vllm.config import ModelConfig, WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)

from mindspeed_mm_rl.models.names import canonical_hf_name
from mindspeed_mm_rl.weights.device import Arrivals
from mindspeed_mm_rl.weights.host import Views, WeightHandle

LOAD_FORMAT = "mindspeed_mm_rl_awaited"
"""The engine argument `load_format` of an engine whose first weights come by `receive`."""
_BACKEND = "mindspeed_mm_rl"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_VISION_PREFIXES = ("visual.", "model.visual.")


@register_model_loader(LOAD_FORMAT)
class AwaitedWeights(BaseModelLoader):
    """Zeros until the trainer sends weights; nothing is read from disk.

    vLLM's own `dummy` format also overwrites buffers that no checkpoint holds (the pixel normalisation of the vision tower), so that
    pictures stay wrong after the weights have come.
    """

    def download_model(self, model_config: ModelConfig) -> None:
        pass

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        for parameter in model.parameters():
            parameter.data.zero_()


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
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: _Update) -> None:
        source = update_info.source
        has_head = any(slot.name == _HEAD for slot in source.slots)
        for views in source.chunks():
            self.model.load_weights(self._wanted(views, has_head))
            if isinstance(source, Arrivals):
                self._keep_what_waits()

    def _wanted(self, views: Views, has_head: bool) -> Iterator[tuple[str, torch.Tensor]]:
        """Without the vision tower where the engine was built without one; with the head that a tied model doesn't send.

        vLLM keeps the old head of a tied model on CPU, where it computes from a packed copy, unless the head is loaded by its own name.
        """
        has_vision = any(name.startswith(_VISION_PREFIXES) for name, _ in self.model.named_parameters())
        yield from ((name, view) for name, view in views if has_vision or not name.startswith(_VISION_PREFIXES))
        if not has_head:
            yield from ((_HEAD, view) for name, view in views if canonical_hf_name(name) == _EMBEDDING)

    def _keep_what_waits(self) -> None:
        """A layer takes its tensors when it has all of them, and the rest of them may come with the next chunk, over this one."""
        for layer in self.model.modules():
            for _, call in get_layerwise_info(layer).loaded_weights:
                tensors = {name: value for name, value in call.arguments.items() if isinstance(value, torch.Tensor) and not value.is_meta}
                call.arguments.update({name: tensor.clone() for name, tensor in tensors.items()})

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


def weight_transfer_config() -> WeightTransferConfig:
    """The engine argument that makes `receive` possible."""
    if _BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(_BACKEND, CarriedWeights)
    return WeightTransferConfig(backend=_BACKEND)


def open_receiver(llm: LLM) -> None:
    """Once, after the engine is built."""
    llm.init_weight_transfer_engine({"init_info": {}})


def receive(llm: LLM, source: WeightHandle | Arrivals, policy_version: int) -> None:
    """Copies the weights into the engine's own (packed) memory, keeping nothing of the shared one, and drops what the old ones computed."""
    llm.start_weight_update()
    llm.update_weights({"update_info": {"source": source}})
    llm.finish_weight_update(weight_version=str(policy_version))
    drop_caches(llm)


def drop_caches(llm: LLM) -> None:
    """Keys and values of prompts, and features of pictures. Raises RuntimeError while a request runs."""
    if not llm.reset_prefix_cache():
        raise RuntimeError("rollout: the prefix cache still holds keys and values; it is only dropped while no request runs")
    llm.llm_engine.reset_encoder_cache()
