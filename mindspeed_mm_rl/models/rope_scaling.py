"""How config.json stretches rope beyond the context that a model was pretrained on, as data; the formulas are in rope.py.

Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (arXiv:2306.15595): every frequency divided by `factor`."""

    factor: float
    attention_factor: float = 1.0


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's, as its released code has it: frequencies whose wavelength fits the original context less than `low_freq_factor`
    times are divided by `factor`, those that fit it more than `high_freq_factor` times are kept, those between are blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int
    attention_factor: float = 1.0


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071). Example: YarnScaling(factor=4.0, original_context=32768, attention_factor=0.1 * math.log(4.0) + 1)."""

    factor: float
    original_context: int
    attention_factor: float
    """cos and sin are multiplied by it, which divides the temperature of attention by its square (section 3.4)."""
    beta_fast: float = 32.0
    """Dimensions that turn more often than this in the original context keep their frequency."""
    beta_slow: float = 1.0
    """Those that turn less often are divided by `factor`; between the two, a ramp."""
    truncate: bool = True
    """Whether the ends of the ramp are whole dimensions."""


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


def read_rope_scaling(rope: Mapping[str, Any], text: Mapping[str, Any]) -> RopeScaling | None:
    """rope: rope_parameters (transformers 5) or rope_scaling (4); text: the text keys. None: frequencies as they are.

    Raises ValueError for a kind that isn't offered, KeyError for a number that is missing.
    """
    kind = rope_kind(rope)
    if kind not in _READERS:
        raise ValueError(f"rope type {kind!r} is not offered; {', '.join(_READERS)} are")
    return _READERS[kind](rope, text)


def rope_kind(rope: Mapping[str, Any]) -> str:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    # transformers 4's word for the three axes of Qwen2-VL, which say nothing about frequencies.
    return "default" if kind == "mrope" else kind


def _linear(rope: Mapping[str, Any], text: Mapping[str, Any]) -> LinearScaling:
    return LinearScaling(float(rope["factor"]))


def _llama3(rope: Mapping[str, Any], text: Mapping[str, Any]) -> Llama3Scaling:
    return Llama3Scaling(
        float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), _original_context(rope, text)
    )


def _yarn(rope: Mapping[str, Any], text: Mapping[str, Any]) -> YarnScaling:
    factor = float(rope["factor"])
    return YarnScaling(
        factor=factor,
        original_context=_original_context(rope, text),
        attention_factor=_attention_factor(rope, factor),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        truncate=rope.get("truncate", True),
    )


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """Given, or DeepSeek's quotient of two magnitudes, or the paper's 0.1 ln(factor) + 1 (section 3.4)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    over, under = rope.get("mscale"), rope.get("mscale_all_dim")
    if over and under:
        return _magnitude(factor, over) / _magnitude(factor, under)
    return _magnitude(factor, 1.0)


def softmax_magnitude(rope: Mapping[str, Any]) -> float:
    """DeepSeek's factor of the softmax scale: the square of the magnitude that mscale_all_dim names; 1 where there is none."""
    under = rope.get("mscale_all_dim")
    return _magnitude(float(rope["factor"]), under) ** 2 if under and rope_kind(rope) != "default" else 1.0


def _magnitude(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _original_context(rope: Mapping[str, Any], text: Mapping[str, Any]) -> int:
    """In transformers' order of precedence."""
    return int(
        text.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or text["max_position_embeddings"]
    )


_READERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], RopeScaling | None]] = {
    "default": lambda rope, text: None,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
