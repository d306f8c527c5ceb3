"""Pictures through a vision encoder, wherever it lives: in a policy's first stage or in processes of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from mindspeed_mm_rl.config.plan import TrainPlan
from mindspeed_mm_rl.data.images import pixel_values, read_image_settings
from mindspeed_mm_rl.data.packing import micro_batches
from mindspeed_mm_rl.platforms import device
from mindspeed_mm_rl.types import GridTHW, ImageFeatures, ImageInput

_PATCHES_PER_PASS = 16384
"""Bounds the activations of one pass, not its result."""


class EncodesImages(Protocol):
    def encode_images(self, pixel_values: torch.Tensor, grids: Sequence[GridTHW]) -> torch.Tensor: ...


class PictureEncoder:
    """Sizes, dtype and place of the pixels that a network's encoder takes."""

    def __init__(self, plan: TrainPlan) -> None:
        self.settings = read_image_settings(plan.hf_path, plan.min_pixels, plan.max_pixels)
        self.dtype = getattr(torch, plan.dtype)

    def one_pass(self, network: EncodesImages, images: Sequence[ImageInput]) -> tuple[torch.Tensor, ...]:
        """Features of each picture [image tokens, text hidden], with gradient where the encoder is trained."""
        pixels, grids = pixel_values(images, self.settings)
        features = network.encode_images(pixels.to(device.current(), self.dtype), grids)
        return features.split([image.num_tokens(self.settings.merge_size) for image in images])

    @torch.no_grad()
    def features(self, network: EncodesImages, images: dict[str, ImageInput]) -> dict[str, ImageFeatures]:
        """Every picture once, on the host."""
        table: dict[str, ImageFeatures] = {}
        for chosen in passes(list(images.values())):
            for image, features in zip(chosen, self.one_pass(network, chosen), strict=True):
                table[image.key] = ImageFeatures(features.cpu(), image.grid_thw)
        return table


def passes(images: Sequence[ImageInput]) -> Iterator[list[ImageInput]]:
    """Pictures that go through an encoder together."""
    for group in micro_batches([math.prod(image.grid_thw) for image in images], _PATCHES_PER_PASS):
        yield [images[i] for i in group]
