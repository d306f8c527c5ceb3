"""Rotary positions: text and pictures on three axes (mrope), patches on two."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from mindspeed_mm_rl.models.families import Architecture, TextArchitecture, VisionArchitecture
from mindspeed_mm_rl.models.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling
from mindspeed_mm_rl.types import GridTHW

VISION_THETA = 10000.0


def mrope_positions(token_ids: Sequence[int] | torch.Tensor, grids: Sequence[GridTHW], architecture: Architecture) -> torch.Tensor:
    """Positions (time, height, width) of the tokens of one sequence, image tokens expanded; int64 [3, L].

    Text counts up by one on all axes; a picture that starts at p has p + (t, h, w) of its merged grid, and the text behind it
    goes on at p + max(h, w) (Qwen2-VL, arXiv:2409.12191, section 2.1).
    Raises ValueError when the runs of image tokens don't fit the grids.
    """
    ids = np.asarray(token_ids)
    positions = np.tile(np.arange(len(ids), dtype=np.int64), (3, 1))
    if architecture.vision is None:
        if grids:
            raise ValueError(f"{len(grids)} pictures were given to a {architecture.model_type} model, which takes text only")
        return torch.from_numpy(positions)
    merge = architecture.vision.merge_size
    image_tokens = np.flatnonzero(ids == architecture.image_token_id)
    _check_image_tokens(image_tokens, grids, merge)
    taken = 0
    for time, height, width in grids:
        rows, columns = height // merge, width // merge
        count = time * rows * columns
        start = image_tokens[taken]
        taken += count
        offsets = np.indices((time, rows, columns)).reshape(3, count)
        positions[:, start + count :] -= count - max(rows, columns)
        positions[:, start : start + count] = positions[0, start] + offsets
    return torch.from_numpy(positions)


def _check_image_tokens(image_tokens: np.ndarray, grids: Sequence[GridTHW], merge: int) -> None:
    counts = [time * height * width // merge**2 for time, height, width in grids]
    if sum(counts) != len(image_tokens):
        raise ValueError(
            f"{len(image_tokens)} image tokens in the sequence, but its pictures {list(grids)} make {counts} "
            f"(patches / merge_size ** 2, merge_size {merge})"
        )
    taken = 0
    for count in counts:
        run = image_tokens[taken : taken + count]
        if run[-1] - run[0] != count - 1:
            raise ValueError(f"the {count} tokens of a picture must stand side by side; they lie between {run[0]} and {run[-1]}")
        taken += count


def rotary(positions: torch.Tensor, text: TextArchitecture) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [T, head_dim], of positions int64 [3, T]; the two halves of head_dim are equal (NeoX order)."""
    frequencies = _scaled_frequencies(text, positions.device)
    sections = text.mrope_section or (text.head_dim // 2, 0, 0)
    axis = torch.repeat_interleave(torch.arange(3, device=positions.device), torch.tensor(sections, device=positions.device))
    cos, sin = _cos_sin(positions.float()[axis].T * frequencies)
    factor = 1.0 if text.rope_scaling is None else text.rope_scaling.attention_factor
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def vision_rotary(positions: torch.Tensor, vision: VisionArchitecture) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [P, head_dim], of patch positions (height, width) int64 [2, P]; a quarter of head_dim per axis, twice."""
    head_dim = vision.hidden_size // vision.num_heads
    angles = positions.float()[..., None] * _frequencies(head_dim // 2, VISION_THETA, positions.device)
    return _cos_sin(torch.cat([angles[0], angles[1]], dim=-1))


def _periods(dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """Wavelengths / 2 pi, float32 [dim / 2]."""
    return theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def _frequencies(dim: int, theta: float, device: torch.device) -> torch.Tensor:
    return 1.0 / _periods(dim, theta, device)


def _scaled_frequencies(text: TextArchitecture, device: torch.device) -> torch.Tensor:
    periods = _periods(text.head_dim, text.rope_theta, device)
    match text.rope_scaling:
        case None:
            return 1.0 / periods
        case LinearScaling(factor=factor):
            return 1.0 / periods / factor
        case Llama3Scaling() as scaling:
            return _llama3_frequencies(1.0 / periods, scaling)
        case YarnScaling() as scaling:
            return _yarn_frequencies(periods, text.rope_theta, scaling)


def _llama3_frequencies(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Kept, divided by the factor, or between the two, by how often the wavelength fits the original context."""
    fits = scaling.original_context / (2 * math.pi / frequencies)
    kept = ((fits - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn_frequencies(periods: torch.Tensor, theta: float, scaling: YarnScaling) -> torch.Tensor:
    """YaRN's "NTK by parts" (section 3.2), its ramp in dimensions rather than in rotations, as the published checkpoints have it."""
    dim = 2 * len(periods)

    def dimension_with(rotations: float) -> float:
        return dim * math.log(scaling.original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_with(scaling.beta_fast), dimension_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    # A ramp of no width is a step.
    width = high - low or 0.001
    kept = 1 - ((torch.arange(len(periods), dtype=torch.float32, device=periods.device) - low) / width).clamp(0, 1)
    # In this order transformers and vLLM round alike; one bit of a frequency is 2e-4 of an angle at position 4000.
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept


def _cos_sin(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()
