"""The vision encoder and projector alone, under the names that they have inside of a policy."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mindspeed_mm_rl.models.families import Architecture
from mindspeed_mm_rl.models.gpt import ModelOptions
from mindspeed_mm_rl.models.mm_module import MMModule
from mindspeed_mm_rl.models.names import Entry, entries
from mindspeed_mm_rl.models.placement import Piece
from mindspeed_mm_rl.models.rank_pieces import Grid, GridPlace, chunk_pieces
from mindspeed_mm_rl.models.vision import ImageEncoder, vision_config
from mindspeed_mm_rl.models.weight_sources import VISION_PARTS
from mindspeed_mm_rl.types import GridTHW


class VisionTower(MMModule):
    def __init__(self, architecture: Architecture, options: ModelOptions, freeze_vision: bool, freeze_projector: bool) -> None:
        super().__init__(config=vision_config(architecture.vision, options))
        self.architecture = architecture
        self.image_encoder = ImageEncoder(architecture.vision, options, freeze_vision, freeze_projector)

    def encode_images(self, pixel_values: torch.Tensor, grids: Sequence[GridTHW]) -> torch.Tensor:
        """As Network.encode_images."""
        return self.image_encoder(pixel_values, grids)


def vision_entries(architecture: Architecture) -> list[Entry]:
    return [entry for entry in entries(architecture.raw) if entry.part in VISION_PARTS]


def vision_pieces(architecture: Architecture, tensor_rank: int, tensor_size: int) -> tuple[Piece, ...]:
    """What one tensor-parallel rank holds."""
    grid = Grid(((architecture.vision.num_layers,),), tensor=tensor_size)
    return chunk_pieces(vision_entries(architecture), grid, GridPlace(tensor=tensor_rank))
