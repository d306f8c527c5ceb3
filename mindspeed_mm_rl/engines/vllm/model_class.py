"""vLLM's model class, imported in this process."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig
from vllm import ModelRegistry
from vllm.plugins import load_general_plugins

from mindspeed_mm_rl.models.families import read_architecture


def import_model_class(hf_path: str | Path) -> None:
    """Call before LLM(). Raises ValueError when vLLM doesn't know the folder's architecture.

    vLLM would inspect the class in a fresh Python process (to keep CUDA untouched before a fork, which doesn't happen here). That costs
    seconds, and that process doesn't import this package, so on CPU builds of torch its import of torchvision fails.
    """
    # vllm-ascend brings classes of its own, and mends what keeps vLLM's from being imported beside torch 2.5.
    load_general_plugins()
    for name in read_architecture(hf_path).raw.get("architectures", []):
        if name not in ModelRegistry.models:
            raise ValueError(f"{hf_path}/config.json: vLLM doesn't know the architecture {name}")
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def with_text_keys(config: PretrainedConfig) -> PretrainedConfig:
    """Models with vision of vLLM 0.9 look for the sizes of the text model at the top of config.json, where newer files don't have them."""
    for key, value in config.get_text_config().to_dict().items():
        if key not in vars(config):
            setattr(config, key, value)
    return config
