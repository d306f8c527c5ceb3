"""New weights into a running vLLM engine by its weight-update API, with a backend of our own.

The only file, beside launching.py, that touches vLLM's private parts.

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
from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload, initialize_layerwise_reload

from mindspeed_mm_rl.models.names import canonical_hf_name
from mindspeed_mm_rl.weights.host import WeightHandle, open_views

LOAD_FORMAT = "mindspeed_mm_rl_awaited"
"""The engine argument `load_format` of an engine whose first weights come by `receive`."""
_BACKEND = "mindspeed_mm_rl_host"
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
class _HostInit(WeightTransferInitInfo):
    pass


@dataclass
class _HostUpdate(WeightTransferUpdateInfo):
    handle: WeightHandle


class HostWeightEngine(WeightTransferEngine[_HostInit, _HostUpdate]):
    """Loads what a HostBuffer holds; layers that it doesn't hold keep their weights."""

    init_info_cls = _HostInit
    update_info_cls = _HostUpdate

    def init_transfer_engine(self, init_info: _HostInit) -> None:
        pass

    def start_weight_update(self) -> None:
        for module in self.model.modules():
            quant_method = getattr(module, "quant_method", None)
            if type(quant_method).__name__ == "UnquantizedFusedMoEMethod":
                # On CPU the packed experts would silently stay the old ones.
                quant_method.moe_kernel = None
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: _HostUpdate) -> None:
        self.model.load_weights(self._wanted(update_info.handle))

    def _wanted(self, handle: WeightHandle) -> Iterator[tuple[str, torch.Tensor]]:
        """Without the vision tower where the engine was built without one; with the head that a tied model doesn't send.

        vLLM keeps the old head of a tied model on CPU, where it computes from a packed copy, unless the head is loaded by its own name.
        """
        has_vision = any(name.startswith(_VISION_PREFIXES) for name, _ in self.model.named_parameters())
        views = dict(open_views(handle))
        yield from ((name, view) for name, view in views.items() if has_vision or not name.startswith(_VISION_PREFIXES))
        if _HEAD not in views:
            yield _HEAD, next(view for name, view in views.items() if canonical_hf_name(name) == _EMBEDDING)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


def weight_transfer_config() -> WeightTransferConfig:
    """The engine argument that makes `receive` possible."""
    if _BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(_BACKEND, HostWeightEngine)
    return WeightTransferConfig(backend=_BACKEND)


def open_receiver(llm: LLM) -> None:
    """Once, after the engine is built."""
    llm.init_weight_transfer_engine({"init_info": {}})


def receive(llm: LLM, handle: WeightHandle, policy_version: int) -> None:
    """Copies the weights into the engine's own (packed) memory, keeping nothing of the shared one, and drops what the old ones computed."""
    llm.start_weight_update()
    llm.update_weights({"update_info": {"handle": handle}})
    llm.finish_weight_update(weight_version=str(policy_version))
    drop_caches(llm)


def drop_caches(llm: LLM) -> None:
    """Keys and values of prompts, and features of pictures. Raises RuntimeError while a request runs."""
    if not llm.reset_prefix_cache():
        raise RuntimeError("rollout: the prefix cache still holds keys and values; it is only dropped while no request runs")
    llm.llm_engine.reset_encoder_cache()
