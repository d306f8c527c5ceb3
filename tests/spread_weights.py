"""Weights of small models as the processes of a layout hold them, without a network."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mindspeed_mm_rl.models.names import Shape
from mindspeed_mm_rl.models.placement import Piece
from mindspeed_mm_rl.models.rank_pieces import Grid, GridPlace, chunk_pieces, grid_entries, read_pieces

_TEXT = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 20,
    "tie_word_embeddings": False,
}
_VISION = {"depth": 2, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 8, "patch_size": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "text": {"model_type": "qwen2", **_TEXT},
    "tied text": {"model_type": "qwen2", **_TEXT, "tie_word_embeddings": True},
    "wide text": {"model_type": "qwen2", **_TEXT, "hidden_size": 512, "intermediate_size": 2048, "vocab_size": 1024},
    "pictures": {"model_type": "qwen2_5_vl", **_TEXT, "vision_config": _VISION},
    "experts": {"model_type": "qwen3_moe", **_TEXT, "head_dim": 4, "num_experts": 4, "moe_intermediate_size": 4, "mlp_only_layers": [1]},
}


@dataclass(frozen=True)
class Spread:
    """Example: Spread("tied text", 4, Grid(((2, 2),), tensor=2))."""

    config: str
    world: int
    grid: Grid

    def places(self) -> list[GridPlace]:
        """By rank, as megatron counts: tensor (and context, data) fastest, stages slowest; experts in groups of their own of a stage."""
        grid, stage = self.grid, self.world // self.grid.pipeline
        return [
            GridPlace(
                rank % grid.tensor, rank // stage, rank % stage // grid.expert_tensor % grid.expert, rank % stage % grid.expert_tensor
            )
            for rank in range(self.world)
        ]

    def pieces(self, rank: int) -> list[tuple[Piece, ...]]:
        """By virtual stage."""
        place, table = self.places()[rank], grid_entries(CONFIGS[self.config], self.grid)
        return [chunk_pieces(table, self.grid, place, virtual) for virtual in range(self.grid.virtual)]

    def shapes(self) -> dict[str, Shape]:
        table = grid_entries(CONFIGS[self.config], self.grid)
        return {name: shape for entry in table for name, shape in zip(entry.hf, entry.hf_shapes, strict=True)}

    def whole(self, seed: int) -> dict[str, torch.Tensor]:
        """Every tensor of the model, with numbers that all differ; of two dtypes, which a rank learns of what it doesn't hold."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in self.shapes().items()}
        return {name: tensor.bfloat16() if "norm" in name else tensor for name, tensor in tensors.items()}

    def held(self, rank: int, whole: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return [read_pieces(whole, pieces) for pieces in self.pieces(rank)]


SPREADS = {
    "one process": Spread("tied text", 1, Grid(((4,),))),
    "TP2": Spread("text", 2, Grid(((4,),), tensor=2)),
    "DP4": Spread("pictures", 4, Grid(((4,),))),
    "TP2xPP2": Spread("text", 4, Grid(((3, 1),), tensor=2)),
    "TP2xPP2, tied": Spread("tied text", 4, Grid(((2, 2),), tensor=2)),
    "TP2xPP2xDP2, pictures": Spread("pictures", 8, Grid(((2, 2),), tensor=2)),
    "PP2+VPP2, tied": Spread("tied text", 2, Grid(((1, 1), (1, 1)))),
    "EP2": Spread("experts", 2, Grid(((4,),), expert=2)),
    "TP2xEP2": Spread("experts", 4, Grid(((4,),), tensor=2, expert=2)),
    "TP2xEP2xETP2": Spread("experts", 4, Grid(((4,),), tensor=2, expert=2, expert_tensor=2)),
    "PP2xEP2, experts cut": Spread("experts", 8, Grid(((1, 3),), tensor=2, expert=2, expert_tensor=2)),
}

WIDE = Spread("wide text", 2, Grid(((4,),), tensor=2))
"""70 MB."""


def node_choices(world: int) -> list[Sequence[str]]:
    """One node, the halves on two, and two nodes in turns."""
    one = ["here"] * world
    halves = ["here"] * (world // 2) + ["there"] * (world - world // 2)
    return [one, halves, [name for _, name in zip(range(world), itertools.cycle(("here", "there")), strict=False)]]
