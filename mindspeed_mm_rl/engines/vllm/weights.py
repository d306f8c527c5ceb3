"""New weights into a running vLLM engine.

    from vLLM 0.27   by its weight-update API, with a backend of our own: start_weight_update -> update_weights -> finish_weight_update
    before           by a method that is mixed into its worker

Both map the trainer's memory, load from it and keep nothing of it; then caches are dropped. Beside patches/vllm_*.py, only this file and
those that it imports from this folder, and submission.py, touch vLLM's private parts.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from vllm import LLM
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform

from mindspeed_mm_rl.engines.vllm import loading
from mindspeed_mm_rl.engines.vllm.extension import WorkerExtension
from mindspeed_mm_rl.platforms import compat
from mindspeed_mm_rl.weights.device import Arrivals
from mindspeed_mm_rl.weights.host import WeightHandle

_LOAD_FORMAT = "mindspeed_mm_rl_awaited"


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
        loading.remember(model)


def engine_arguments() -> dict[str, Any]:
    """Of an engine whose first weights come by `receive`."""
    if compat.vllm_has_update_api():
        from mindspeed_mm_rl.engines.vllm.official import weight_transfer_config

        return {"load_format": _load_format(), "weight_transfer_config": weight_transfer_config()}
    return {"load_format": _load_format(), "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}"}


@functools.cache
def _load_format() -> str | type[BaseModelLoader]:
    if compat.vllm_is_0_9():
        return AwaitedWeights
    from vllm.model_executor.model_loader import register_model_loader

    register_model_loader(_LOAD_FORMAT)(AwaitedWeights)
    return _LOAD_FORMAT


def open_receiver(llm: LLM) -> None:
    """Once, after the engine is built."""
    if compat.vllm_has_update_api():
        llm.init_weight_transfer_engine({"init_info": {}})
    elif compat.vllm_is_0_9() or current_platform.is_out_of_tree():
        # vllm-ascend builds its sampler without the engine's logprobs_mode.
        llm.collective_rpc(WorkerExtension.score_processed_logits.__name__)


def receive(llm: LLM, source: WeightHandle | Arrivals, policy_version: int) -> None:
    """Copies the weights into the engine's own (packed) memory, keeping nothing of the shared one, and drops what the old ones computed."""
    if compat.vllm_has_update_api():
        llm.start_weight_update()
        llm.update_weights({"update_info": {"source": source}})
        llm.finish_weight_update(weight_version=str(policy_version))
    else:
        llm.collective_rpc(WorkerExtension.load_carried_weights.__name__, args=(source,))
    drop_caches(llm)


def drop_caches(llm: LLM) -> None:
    """Keys and values of prompts, and features of pictures. Raises RuntimeError while a request runs."""
    engine = llm.llm_engine
    if compat.vllm_renders():
        is_dropped = llm.reset_prefix_cache()
        engine.reset_encoder_cache()
    else:
        # Its method returns nothing. Features of pictures are kept no longer than their request.
        is_dropped = engine.engine_core.engine_core.scheduler.reset_prefix_cache()
    if not is_dropped:
        raise RuntimeError("rollout: the prefix cache still holds keys and values; it is only dropped while no request runs")
