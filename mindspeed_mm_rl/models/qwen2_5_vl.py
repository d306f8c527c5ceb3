"""The policy: a text decoder, with or without a vision encoder in front of it. Parameter names are those of the MM checkpoint layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from megatron.core.transformer.module import MegatronModule

from mindspeed_mm_rl.models.attention import PackedLayout
from mindspeed_mm_rl.models.families import Architecture
from mindspeed_mm_rl.models.gpt import ModelOptions, TextDecoder, pipeline_ends, text_config
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
    dtype: torch.dtype = torch.float32,
    freeze_vision: bool = True,
    freeze_projector: bool = True,
    recompute: bool = False,
    deterministic: bool = False,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    context_parallel_size: int = 1,
    sequence_parallel: bool = False,
) -> AnyNetwork:
    """A network with random weights on this process's device, in eval or train mode as torch modules are (train).

    Needs, in this order: device.adapt_megatron(), torch.distributed, parallel_state.initialize_model_parallel(...) with the same
    sizes, tensor_parallel.model_parallel_cuda_manual_seed(seed).
    """
    options = ModelOptions(
        dtype=dtype,
        recompute=recompute,
        deterministic=deterministic,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        context_parallel_size=context_parallel_size,
        sequence_parallel=sequence_parallel,
    )
    return network(architecture, options, FrozenParts(freeze_vision, freeze_projector))


@dataclass(frozen=True)
class FrozenParts:
    vision: bool = True
    projector: bool = True


class Network(MegatronModule):
    """consumes: packed token ids, a PackedLayout, image features. produces: states before the head, image features."""

    decoder_class: type[TextDecoder] = TextDecoder

    def __init__(self, architecture: Architecture, options: ModelOptions, frozen: FrozenParts) -> None:
        config = text_config(architecture.text, options)
        super().__init__(config=config)
        self.architecture = architecture
        self.pre_process, self.post_process = pipeline_ends()
        self.image_encoder = None
        if architecture.vision is not None and self.pre_process:
            self.image_encoder = ImageEncoder(architecture.vision, options, frozen.vision, frozen.projector)
        self.text_decoder = self.decoder_class(architecture.text, config, self.pre_process, self.post_process)

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
        positions = torch.cat([mrope_positions(row, grids, self.architecture) for row, grids in rows], dim=1)
        cos, sin = rotary(positions, self.architecture.text)
        return PackedLayout.of([len(row) for row in token_rows], cos.to(device.current()), sin.to(device.current()), causal=True)

    def forward(self, token_ids: torch.Tensor, layout: PackedLayout, image_features: torch.Tensor | None = None) -> torch.Tensor:
        """States after the final norm, [T, hidden], of packed token ids [T].

        image_features [N, hidden] stand in for the N image tokens, in order; raises ValueError when there are more or fewer.
        """
        embeddings = self._embeddings(token_ids, image_features) if self.pre_process else None
        return self.text_decoder(embeddings, layout)

    def _embeddings(self, token_ids: torch.Tensor, image_features: torch.Tensor | None) -> torch.Tensor:
        embeddings = self.text_decoder.embed(token_ids)
        if self.architecture.vision is None and image_features is None:
            return embeddings
        slots = (token_ids == self.architecture.image_token_id).nonzero()[:, 0]
        given = 0 if image_features is None else image_features.shape[0]
        if given != len(slots):
            raise ValueError(f"{len(slots)} image tokens in the pack, but {given} image features were given")
        if image_features is None:
            return embeddings
        return embeddings.index_copy(0, slots, image_features.to(embeddings.dtype))

    def weights(self) -> dict[str, torch.Tensor]:
        """Parameters of this rank by their MM name; a tied head has none."""
        return dict(self.named_parameters())

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copies tensors by MM name into this rank's parameters, cast to their dtype.

        Raises ValueError naming what is missing, unexpected, or of another shape; nothing is copied then.
        """
        own = self.weights()
        missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
        if missing or unexpected:
            raise ValueError(
                f"weights don't fit the {self.architecture.model_type} model: missing {missing[:5]}, unexpected {unexpected[:5]}"
            )
        for name, parameter in own.items():
            if parameter.shape != weights[name].shape:
                raise ValueError(f"{name}: the model wants shape {tuple(parameter.shape)}, the weights have {tuple(weights[name].shape)}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor | None]) -> None:
        """Megatron's schedules hand a pipeline stage its input here."""
        self.text_decoder.set_input_tensor(input_tensor)

    @property
    def share_embeddings_and_output_weights(self) -> bool:
        return self.text_decoder.share_embeddings_and_output_weights

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        return self.text_decoder.shared_embedding_or_output_weight()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """For megatron's dist_checkpointing; one entry per layer, so that the names in the file are the MM names."""
        return super().sharded_state_dict(prefix, sharded_offsets, {**(metadata or {}), "non_homogeneous_layers": True})


class Policy(Network):
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden] -> [N, vocabulary / tensor-parallel ranks]"""
        return self.text_decoder.logits(hidden)
