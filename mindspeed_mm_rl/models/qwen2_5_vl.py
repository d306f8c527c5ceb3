"""The policy: a text decoder, with or without a vision encoder in front of it. Parameter names are those of the MM checkpoint layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.enums import ModelType

from mindspeed_mm_rl.models.attention import PackedLayout
from mindspeed_mm_rl.models.context_parallel import context_share
from mindspeed_mm_rl.models.families import Architecture
from mindspeed_mm_rl.models.gpt import ModelOptions, Stage, TextDecoder, text_config
from mindspeed_mm_rl.models.mm_module import MMModule
from mindspeed_mm_rl.models.rank_pieces import Grid
from mindspeed_mm_rl.models.rope import mrope_positions, rotary
from mindspeed_mm_rl.models.vision import ImageEncoder
from mindspeed_mm_rl.platforms import device
from mindspeed_mm_rl.types import GridTHW

AnyNetwork = TypeVar("AnyNetwork", bound="Network")


def build_policy(architecture: Architecture, **arguments: Any) -> Policy:
    """`build_network` of the policy."""
    return build_network(Policy, architecture, **arguments)


def build_network(
    network: type[AnyNetwork],
    architecture: Architecture,
    *,
    freeze_vision: bool = True,
    freeze_projector: bool = True,
    with_vision: bool = True,
    pipeline_rank: int = 0,
    virtual: int = 0,
    **options: Any,
) -> AnyNetwork:
    """A stage's network with random weights on this process's device. options: of ModelOptions.

    Needs, in this order: device.adapt_megatron(), torch.distributed, parallel_state.initialize_model_parallel(...) with the same
    sizes, tensor_parallel.model_parallel_cuda_manual_seed(seed).
    """
    settings = ModelOptions(**options)
    grid = settings.grid or Grid(((architecture.text.num_layers,),))
    frozen = FrozenParts(freeze_vision, freeze_projector, with_vision)
    return network(architecture, replace(settings, grid=grid), frozen, Stage.of(grid, pipeline_rank, virtual))


@dataclass(frozen=True)
class FrozenParts:
    vision: bool = True
    projector: bool = True
    are_here: bool = True
    """False: pictures come encoded, and the network has neither of the two."""


class Network(MMModule):
    """consumes: packed token ids, a PackedLayout, image features. produces: states before the head, image features."""

    decoder_class: type[TextDecoder] = TextDecoder

    def __init__(self, architecture: Architecture, options: ModelOptions, frozen: FrozenParts, stage: Stage) -> None:
        config = text_config(architecture.text, options)
        super().__init__(config=config)
        self.architecture, self.options = architecture, options
        self.pre_process, self.post_process = stage.is_first, stage.is_last
        # What megatron's schedules ask a model for.
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = stage.virtual if config.virtual_pipeline_model_parallel_size else None
        self.image_encoder = None
        if architecture.vision is not None and stage.is_first and frozen.are_here:
            self.image_encoder = ImageEncoder(architecture.vision, options, frozen.vision, frozen.projector)
        self.text_decoder = self.decoder_class(architecture.text, config, options, stage)

    def encode_images(self, pixel_values: torch.Tensor, grids: Sequence[GridTHW]) -> torch.Tensor:
        """Image features [sum of t * h * w / merge_size ** 2, hidden] of pixel_values [P, patch values], pictures one behind the other.

        With gradient only where a part of the encoder is trained.
        """
        if self.image_encoder is None:
            raise ValueError(f"a {self.architecture.model_type} model has no vision encoder on this rank")
        return self.image_encoder(pixel_values, grids)

    def layout(self, token_rows: Sequence[Sequence[int] | torch.Tensor], grids_rows: Sequence[Sequence[GridTHW]]) -> PackedLayout:
        """Positions and borders of rows of token ids (image tokens expanded) packed one behind the other, on this process's device.

        grids_rows: patches (time, height, width) of each row's pictures; raises ValueError when they don't fit the image tokens.
        """
        rows = zip(token_rows, grids_rows, strict=True)
        positions = [mrope_positions(row, grids, self.architecture) for row, grids in rows]
        lengths = [len(row) for row in token_rows]
        padding = -sum(lengths) % self.options.pack_multiple
        if padding:
            positions.append(torch.arange(padding).expand(3, -1))
            lengths.append(padding)
        cos, sin = (part.to(device.current()) for part in rotary(torch.cat(positions, dim=1), self.architecture.text))
        layout = replace(PackedLayout.of(lengths, cos, sin, causal=True), padding=padding)
        return layout if self.options.context_parallel_size == 1 else self._shared(layout)

    def _shared(self, layout: PackedLayout) -> PackedLayout:
        ranks, rank = self.options.context_parallel_size, parallel_state.get_context_parallel_rank()
        share = context_share(layout.segments.queries, ranks, rank, self.options.context_parallel_algorithm, device.current())
        return replace(layout, cos=layout.cos[share.own], sin=layout.sin[share.own], share=share)

    def forward(self, token_ids: torch.Tensor, layout: PackedLayout, image_features: torch.Tensor | None = None) -> torch.Tensor:
        """States after the final norm, [T, hidden], of packed token ids; T are this process's tokens (PackedLayout).

        image_features [N, hidden] stand in for the N image tokens, in order; raises ValueError when there are more or fewer. A stage
        that isn't the last returns what the next one takes.
        """
        embeddings = self._embeddings(token_ids, layout, image_features) if self.pre_process else None
        return self.text_decoder(embeddings, layout)

    def _embeddings(self, token_ids: torch.Tensor, layout: PackedLayout, image_features: torch.Tensor | None) -> torch.Tensor:
        is_image = self._image_slots(token_ids, image_features)
        tokens, is_image = (F.pad(column, (0, layout.padding)) for column in (token_ids, is_image))
        number = is_image.cumsum(0) - 1
        if layout.share is not None:
            tokens, is_image, number = (column[layout.share.own] for column in (tokens, is_image, number))
        embeddings = self.text_decoder.embed(tokens)
        if image_features is None and self.image_encoder is not None and torch.is_grad_enabled():
            image_features = self.image_encoder.no_features()
        if image_features is None:
            return embeddings
        slots = is_image.nonzero()[:, 0]
        return embeddings.index_copy(0, slots, image_features[number[slots]].to(embeddings.dtype))

    def _image_slots(self, token_ids: torch.Tensor, image_features: torch.Tensor | None) -> torch.Tensor:
        """bool [T]: which tokens a picture's features stand in for."""
        if self.architecture.vision is None:
            return torch.zeros_like(token_ids, dtype=torch.bool)
        is_image = token_ids == self.architecture.image_token_id
        given = 0 if image_features is None else image_features.shape[0]
        if given != int(is_image.sum()):
            raise ValueError(f"{int(is_image.sum())} image tokens in the pack, but {given} image features were given")
        return is_image

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor | None]) -> None:
        """Megatron's schedules hand a pipeline stage its input here."""
        self.text_decoder.set_input_tensor(input_tensor)

    @property
    def share_embeddings_and_output_weights(self) -> bool:
        return self.text_decoder.share_embeddings_and_output_weights

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        return self.text_decoder.shared_embedding_or_output_weight()


class Policy(Network):
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden] -> [N, vocabulary / tensor-parallel ranks]"""
        return self.text_decoder.logits(hidden)
