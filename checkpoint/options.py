"""What a user may pass to mm-convert, and which parallel layouts are offered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional, Union

from mindspeed_mm_rl.models.names import sizes

# typing's spelling: the command line is built from these annotations, also on Python 3.10.
Layers = Optional[Union[list[list[int]], list[int]]]  # noqa: UP007, UP045


@dataclass
class HfConfig:
    """The Hugging Face side."""

    hf_dir: str
    """Hugging Face folder: config.json, tokenizer, processor; for hf_to_mm also *.safetensors."""


@dataclass
class ParallelConfig:
    """How the MindSpeed-MM side is split."""

    llm_pp_layers: Layers = None
    """Text layers per pipeline stage, [[28]] or [28]; left out: all of them in one stage."""
    vit_pp_layers: Layers = None
    """Vision layers per pipeline stage, [[32]] or [32]; left out: all of them in one stage."""
    audio_pp_layers: Layers = None
    tp_size: int = 1
    vit_tp_size: int = 0
    """0 = as tp_size."""
    audio_tp_size: int = 0
    ep_size: int = 1


@dataclass
class CommonModelConfig:
    """Switches of the reference converter."""

    enable_canonical_hf_struct: bool = False
    """Not offered: q, k, v and gate, up are always joined."""
    new_transformers_weight_key: bool = False
    """Needs no setting: both generations of names are read."""


@dataclass
class HfToMmOptions:
    """Hugging Face folder -> MindSpeed-MM layout."""

    mm_dir: str
    """Folder to write; must not exist or be empty."""
    hf_config: HfConfig
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    common_model_config: CommonModelConfig = field(default_factory=CommonModelConfig)
    orm: bool = False
    """The model is a critic or a reward model: score.weight [1, hidden] becomes the output layer. --orm for short; needs no setting where
    config.json names a ForSequenceClassification class."""
    save_vit_only: bool = False
    """Only the vision encoder and its projector."""
    trust_remote_code: bool = False
    """Needs no setting: no code of the model folder is ever run."""


@dataclass
class MmToHfOptions:
    """MindSpeed-MM layout or training save -> Hugging Face folder."""

    save_hf_dir: str
    """Folder to write; must not exist or be empty."""
    mm_dir: str
    """Output of hf_to_mm, or a training save (latest_checkpointed_iteration.txt picks the iteration)."""
    hf_config: HfConfig
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    common_model_config: CommonModelConfig = field(default_factory=CommonModelConfig)
    orm: bool = False
    """Write a sequence classification model: of a training save its critic, of the MindSpeed-MM layout what hf_to_mm --orm wrote."""
    trust_remote_code: bool = False
    """Needs no setting: no code of the model folder is ever run."""


def check_layout(parallel: ParallelConfig, common: CommonModelConfig, config: Mapping[str, Any], hf_dir: str) -> None:
    """Raises ValueError when the layer counts are not the model's, or the layout is one that is not offered."""
    known = sizes(config)
    _check_layers("llm_pp_layers", parallel.llm_pp_layers, known["layers"], hf_dir)
    _check_layers("vit_pp_layers", parallel.vit_pp_layers, known.get("vision_layers", 0), hf_dir)
    _check_layers("audio_pp_layers", parallel.audio_pp_layers, 0, hf_dir)
    offered = {"tp_size": (1,), "vit_tp_size": (0, 1), "audio_tp_size": (0, 1), "ep_size": (1,)}
    for name, values in offered.items():
        value = getattr(parallel, name)
        if value not in values:
            raise ValueError(f"parallel_config.{name} is {value}; mm-convert offers tp 1, pp 1, ep 1: pass {name} 1")
    if common.enable_canonical_hf_struct:
        raise ValueError(
            "common_model_config.enable_canonical_hf_struct is true; only joined linear_qkv and linear_fc1 are offered: leave it out"
        )


def _check_layers(name: str, layers: Layers, expected: int, hf_dir: str) -> None:
    if layers is None:
        return
    stages = [count for part in layers for count in (part if isinstance(part, list) else [part])]
    if sum(stages) != expected:
        raise ValueError(
            f"parallel_config.{name} {layers} sums to {sum(stages)} layers but the model in {hf_dir} has {expected}; pass [[{expected}]]"
        )
    if len(stages) > 1:
        raise ValueError(f"parallel_config.{name} {layers} has {len(stages)} stages; mm-convert offers tp 1, pp 1: pass [[{expected}]]")
