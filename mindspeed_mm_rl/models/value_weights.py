"""Where a critic begins: with the weights of a critic or reward model, or with a language model's and a new head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm_rl.models.names import OUTPUT_LAYER, entries, sizes, with_value_head
from mindspeed_mm_rl.models.saved_weights import METADATA_FILE
from mindspeed_mm_rl.models.weight_files import (
    ACTOR_FOLDER,
    CRITIC_FOLDER,
    WeightFolder,
    check_weights,
    open_weights,
    read_megatron_weights,
    recognise,
)
from mindspeed_mm_rl.models.weight_layout import iterate_megatron

_HF_HEAD = "score.weight"


def read_value_weights(folder: str | Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The megatron weights of a value model from any kind of folder. config: config.json of the policy.

    A language model's head is left out and the new one is zero: every value is 0 at first, so that advantages begin as returns, without
    the noise of a random head; it learns from its first gradient, the layers below it from the second.
    Raises ValueError as read_megatron_weights does.
    """
    found, has_head = _found(folder)
    if has_head:
        return read_megatron_weights(found, with_value_head(config))
    weights = {name: tensor for name, tensor in read_megatron_weights(found, config).items() if name != OUTPUT_LAYER}
    return weights | {OUTPUT_LAYER: torch.zeros(1, sizes(config)["hidden"])}


def check_value_weights(folder: str | Path, config: Mapping[str, Any]) -> WeightFolder:
    """Names and shapes against config.json of the policy; reads headers only. Raises ValueError naming folder and weight."""
    found, has_head = _found(folder)
    return check_weights(found, with_value_head(config) if has_head else config)


def check_same_vision(critic: str | Path, actor: str | Path, config: Mapping[str, Any]) -> None:
    """A frozen vision encoder runs once for actor and critic, so it must be the same in both. Raises ValueError.

    Of a training save, as `critic` its critic is meant, as `actor` its actor.
    """
    found, has_head = _found(critic)
    own, others = _vision(found, with_value_head(config) if has_head else config), _vision(actor, config)
    for name, tensor in own.items():
        if not torch.equal(tensor, others[name]):
            raise ValueError(
                f"the vision encoder is frozen, but {name} in {critic} differs from that in "
                f"actor_config.load ({actor}): give a critic with the same vision encoder, or set freeze: false in the model file"
            )


def _vision(folder: str | Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    found = recognise(folder)
    weights = open_weights(found)
    if found.kind == "hf":
        return dict(iterate_megatron(weights, config, ("vision", "projector")))
    return {entry.mm: weights[entry.mm] for entry in entries(config) if entry.part != "text"}


def _found(folder: str | Path) -> tuple[Path, bool]:
    """The folder that is meant (of a training save, the critic where there is one), and whether a value head is in it."""
    found = recognise(folder)
    if found.kind == "training" and Path(folder).name != ACTOR_FOLDER and (found.weights.parent / CRITIC_FOLDER / METADATA_FILE).is_file():
        found = replace(found, weights=found.weights.parent / CRITIC_FOLDER)
    shapes = open_weights(found).shapes
    has_head = _HF_HEAD in shapes if found.kind == "hf" else shapes.get(OUTPUT_LAYER, (0,))[0] == 1
    return (found.weights if found.kind == "training" else Path(folder)), has_head
