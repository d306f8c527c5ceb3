"""Where a critic begins: with the weights of a critic or reward model, or with a language model's and a new head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm_rl.models.names import OUTPUT_LAYER, sizes, with_value_head
from mindspeed_mm_rl.models.placement import Piece
from mindspeed_mm_rl.models.rank_files import open_ranks
from mindspeed_mm_rl.models.rank_pieces import Grid, GridPlace, chunk_pieces, grid_entries, read_pieces
from mindspeed_mm_rl.models.saved_weights import METADATA_FILE
from mindspeed_mm_rl.models.weight_files import ACTOR_FOLDER, CRITIC_FOLDER, WeightFolder, check_weights, open_weights, recognise
from mindspeed_mm_rl.models.weight_sources import VISION_PARTS, Source, different_vision, source_of

_HF_HEAD = "score.weight"


def value_reader(folder: str | Path, config: Mapping[str, Any]) -> Callable[[Sequence[Piece]], dict[str, Tensor]]:
    """Reads pieces of a value model (of with_value_head(config)) from any kind of folder. config: config.json of the policy.

    A language model's head is left out and the new one is zero: every value is 0 at first, so that advantages begin as returns, without
    the noise of a random head; it learns from its first gradient, the layers below it from the second.
    Raises ValueError when the folder holds no weights, or those of another model.
    """
    found, has_head = _found(folder)
    if has_head:
        return partial(read_pieces, source_of(found, with_value_head(config)))
    return partial(_with_new_head, source_of(found, config))


def _with_new_head(source: Source, pieces: Sequence[Piece]) -> dict[str, Tensor]:
    heads = [piece for piece in pieces if piece.name == OUTPUT_LAYER]
    others = [piece for piece in pieces if piece.name != OUTPUT_LAYER]
    return read_pieces(source, others) | {piece.name: torch.zeros(piece.entry.mm_shape) for piece in heads}


def read_value_weights(folder: str | Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """All weights of a value model by megatron name."""
    grid = Grid(((sizes(config)["layers"],),))
    return value_reader(folder, config)(chunk_pieces(grid_entries(with_value_head(config), grid), grid, GridPlace()))


def check_value_weights(folder: str | Path, config: Mapping[str, Any]) -> WeightFolder:
    """Names and shapes against config.json of the policy; reads headers only. Raises ValueError naming folder and weight."""
    found, has_head = _found(folder)
    return check_weights(found, with_value_head(config) if has_head else config)


def check_same_vision(critic: str | Path, actor: str | Path, config: Mapping[str, Any]) -> None:
    """A frozen vision encoder runs once for actor and critic, so it must be the same in both. Raises ValueError.

    Of a training save, as `critic` its critic is meant, as `actor` its actor; a folder of the encoder alone will do for the latter.
    """
    found, has_head = _found(critic)
    own = source_of(found, with_value_head(config) if has_head else config, VISION_PARTS)
    if name := different_vision(own, source_of(actor, config, VISION_PARTS), config):
        raise ValueError(
            f"the vision encoder is frozen, but {name} in {critic} differs from that in "
            f"{actor}: give a critic with the same vision encoder, or set freeze: false in the model file"
        )


def _found(folder: str | Path) -> tuple[Path, bool]:
    """The folder that is meant (of a training save, the critic where there is one), and whether a value head is in it."""
    found = recognise(folder)
    if found.kind == "training" and Path(folder).name != ACTOR_FOLDER and (found.weights.parent / CRITIC_FOLDER / METADATA_FILE).is_file():
        found = replace(found, weights=found.weights.parent / CRITIC_FOLDER)
    return (found.weights if found.kind == "training" else Path(folder)), _has_head(found)


def _has_head(found: WeightFolder) -> bool:
    if found.kind in ("mm", "ranks"):
        # MindSpeed-LLM's names have no prefix.
        outputs = [tensor for *_, name, tensor in open_ranks(found.ranks).names() if OUTPUT_LAYER.endswith(name)]
        return any(tensor.shape[0] == 1 for tensor in outputs)
    shapes = open_weights(found).shapes
    return _HF_HEAD in shapes if found.kind == "hf" else shapes.get(OUTPUT_LAYER, (0,))[0] == 1
