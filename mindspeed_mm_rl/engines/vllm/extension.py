"""What vLLM's worker can't do itself before 0.27: load new weights, and, before 0.10 or on an NPU, return log-probs of the policy that it
samples from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mindspeed_mm_rl.engines.vllm import loading
from mindspeed_mm_rl.platforms import compat
from mindspeed_mm_rl.weights.device import Arrivals
from mindspeed_mm_rl.weights.host import WeightHandle

_GREEDY_BELOW = 1e-5
"""vLLM's own bound for temperatures."""


class WorkerExtension:
    """vLLM mixes it into its worker class (worker_extension_cls) and calls its methods by name (collective_rpc)."""

    def load_carried_weights(self, source: WeightHandle | Arrivals) -> None:
        """Layers of which it brings nothing keep their weights."""
        model, config = self.model_runner.model, self.model_runner.model_config
        if not compat.vllm_reloads_by_layer():
            loading.load_layers(model, config, source)
            return
        from mindspeed_mm_rl.engines.vllm import by_layer

        by_layer.begin(model)
        by_layer.load(model, source)
        by_layer.finish(model, config)

    def score_processed_logits(self) -> None:
        """Once: the sampler takes logits after bias and temperature for the model's, so that its log-probs are those of the policy."""
        sampler = self.model_runner.sampler
        if not compat.vllm_is_0_9():
            sampler.logprobs_mode = sampler.topk_topp_sampler.logprobs_mode = "processed_logprobs"
            return
        sample = sampler.forward

        def sample_processed(logits: torch.Tensor, sampling_metadata: Any) -> Any:
            return sample(*processed(sampler, logits, sampling_metadata))

        sampler.forward = sample_processed


def processed(sampler: Any, logits: torch.Tensor, metadata: Any) -> tuple[torch.Tensor, Any]:
    """logits: [requests, vocabulary]. Returns them in float32 after bias and temperature, and metadata that ask for neither.

    The sampler and metadata are vLLM's, of version 0.9. Rows of greedy requests stay at temperature 1.
    """
    logits = sampler.apply_logits_bias(logits.float(), metadata)
    metadata = replace(metadata, logit_bias=[None] * len(metadata.logit_bias))
    if metadata.temperature is None:
        return logits, metadata
    ones = torch.ones_like(metadata.temperature)
    is_greedy = metadata.temperature < _GREEDY_BELOW
    logits = sampler.apply_temperature(logits, torch.where(is_greedy, ones, metadata.temperature))
    return logits, replace(metadata, temperature=torch.where(is_greedy, metadata.temperature, ones))
