"""Whether a weight push holds the whole model, asked before the rollout engine is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mindspeed_mm_rl.models.names import Part, canonical_hf_name, entries, is_buffer, is_tied
from mindspeed_mm_rl.weights.device import Arrivals
from mindspeed_mm_rl.weights.host import WeightHandle

_TIED_COPY = "lm_head.weight"


def holds_vision(source: WeightHandle | Arrivals) -> bool:
    return any(canonical_hf_name(slot.name).startswith("visual.") for slot in source.slots)


def check_complete(source: WeightHandle | Arrivals, config: Mapping[str, Any], parts: Sequence[Part]) -> None:
    """config: config.json; parts: which of vision, projector and text must be there.

    vLLM itself would leave a layer that isn't sent as it was, and fill a fused layer that is sent in part with whatever was in memory.
    Raises ValueError naming tensors that are missing, unknown, or of another shape.
    """
    table = entries(config)
    known = {name for entry in table for name in entry.hf} | ({_TIED_COPY} if is_tied(config) else set())
    expected = {name: shape for entry in table if entry.part in parts for name, shape in zip(entry.hf, entry.hf_shapes, strict=True)}
    found = {name: slot.shape for slot in source.slots if not is_buffer(name := canonical_hf_name(slot.name))}
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"weight push: {len(missing)} tensors of the rollout model are missing, such as {missing[:3]}")
    if unknown := sorted(found.keys() - known):
        raise ValueError(f"weight push: the rollout model has no {unknown[0]} ({len(unknown)} unknown tensors)")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"weight push: {name} has shape {found[name]} but the rollout model's config.json asks for {shape}")
