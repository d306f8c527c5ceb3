"""Loading by vLLM's own reload, from vLLM 0.18 on: it takes the layers apart and puts each together when it has all its tensors."""

from __future__ import annotations

import torch
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)

from mindspeed_mm_rl.engines.vllm.loading import brings_head, wanted
from mindspeed_mm_rl.weights.device import Arrivals
from mindspeed_mm_rl.weights.host import WeightHandle


def begin(model: torch.nn.Module) -> None:
    initialize_layerwise_reload(model)


def load(model: torch.nn.Module, source: WeightHandle | Arrivals) -> None:
    """Layers of which it brings nothing keep their weights."""
    has_head = brings_head(source)
    for views in source.chunks():
        model.load_weights(wanted(model, views, has_head))
        if isinstance(source, Arrivals):
            _keep_what_waits(model)


def _keep_what_waits(model: torch.nn.Module) -> None:
    """A layer takes its tensors when it has all of them, and the rest of them may come with the next chunk, over this one."""
    for layer in model.modules():
        for _, call in get_layerwise_info(layer).loaded_weights:
            tensors = {name: value for name, value in call.arguments.items() if isinstance(value, torch.Tensor) and not value.is_meta}
            call.arguments.update({name: tensor.clone() for name, tensor in tensors.items()})


def finish(model: torch.nn.Module, model_config: ModelConfig) -> None:
    finalize_layerwise_reload(model, model_config)
