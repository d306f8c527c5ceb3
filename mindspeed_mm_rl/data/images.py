"""Pictures: bytes to one resized RGB array, arrays to the patches a vision encoder eats, and the tokens they take in a prompt."""

from __future__ import annotations

import hashlib
import io
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from mindspeed_mm_rl.config.model_file import read_json
from mindspeed_mm_rl.types import GridTHW, ImageInput

_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow raises on bytes that are no picture, or only the beginning of one."""

_MAX_ASPECT_RATIO = 200
_RGB_MAX = 255.0
_BICUBIC = int(Image.Resampling.BICUBIC)
_ONLY = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / _RGB_MAX, "resample": _BICUBIC}
"""Keys of preprocessor_config.json that would change the pixels, with the one value that is offered (and meant where there is none)."""


@dataclass(frozen=True)
class ImageSettings:
    """How one model wants its pictures. Example: ImageSettings(14, 2, 2, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), 3136, 1003520)."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    min_pixels: int
    max_pixels: int

    @property
    def factor(self) -> int:
        """Both sides of a picture are multiples of it, so that patches merge without remainder."""
        return self.patch_size * self.merge_size

    def num_tokens(self, grid: GridTHW) -> int:
        return math.prod(grid) // self.merge_size**2


def read_image_settings(hf_path: str | Path, min_pixels: int, max_pixels: int) -> ImageSettings:
    """Reads preprocessor_config.json (or the image_processor part of processor_config.json) of a Hugging Face folder.

    Raises ValueError when there is none, a key is missing or has a value that isn't offered, or no picture can satisfy the pixel bounds.
    """
    path, values = _preprocessor(Path(hf_path).expanduser())
    keys = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
    if missing := [key for key in keys if key not in values]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it must be the one that belongs to the vision-language model")
    for key, only in _ONLY.items():
        if values.get(key) is not None and not math.isclose(values[key], only):
            raise ValueError(f"{path}: {key} {values[key]} is not offered; only {only} is, which Qwen2.5-VL has")
    patch, temporal, merge = (int(values[key]) for key in keys[:3])
    smallest = (patch * merge) ** 2
    if not 0 < min_pixels <= max_pixels or max_pixels < smallest:
        raise ValueError(
            f"megatron_training.max_pixels ({max_pixels}) must be >= megatron_training.min_pixels ({min_pixels}) and >= {smallest}, one "
            f"merged patch of {patch} x {merge} pixels a side; raise it"
        )
    return ImageSettings(patch, temporal, merge, tuple(values["image_mean"]), tuple(values["image_std"]), min_pixels, max_pixels)


def _preprocessor(folder: Path) -> tuple[Path, dict[str, Any]]:
    classic, merged = folder / "preprocessor_config.json", folder / "processor_config.json"
    if classic.is_file():
        return classic, read_json(classic)
    if merged.is_file() and (values := read_json(merged).get("image_processor")):
        return merged, values
    raise ValueError(f"{folder} has no preprocessor_config.json: copy it from the Hugging Face folder of the vision-language model")


def load_image(encoded: bytes) -> Image.Image:
    """Decodes to RGB, upright, transparency on white. Raises ValueError when the bytes are not a whole picture."""
    try:
        image = Image.open(io.BytesIO(encoded))
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except _DECODE_ERRORS as error:
        raise _corrupt(error) from error


def check_image(encoded: bytes) -> tuple[int, int]:
    """(height, width) as stored, without decoding all pixels where the format lets us (PNG checksums, scaled JPEG).

    Raises ValueError as load_image. A picture takes as many tokens lying as upright, so its EXIF orientation doesn't matter here.
    """
    try:
        image = Image.open(io.BytesIO(encoded))
        width, height = image.size
        if image.format == "PNG":
            image.verify()
        else:
            image.draft("RGB", (width // 8, height // 8))
            image.load()
        return height, width
    except _DECODE_ERRORS as error:
        raise _corrupt(error) from error


def _corrupt(error: Exception) -> ValueError:
    # Pillow's own words for it hold the address of a buffer.
    reason = "no picture format that is known" if isinstance(error, UnidentifiedImageError) else error
    return ValueError(f"an image is corrupt ({reason})")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey to 255 instead of scaling it: nearly every pixel would be white.
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def resized_size(height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
    """Nearest (height, width) that are multiples of the factor with an area within [min_pixels, max_pixels], aspect ratio kept.

    The rule of Qwen2-VL (smart_resize of its processor). Engines apply it again to what we resized, so it must change nothing the
    second time; ValueError where it would, and for aspect ratios over 200.
    """
    size = _smart_resize(height, width, settings)
    if _smart_resize(*size, settings) != size:
        raise ValueError(
            f"an image of {height} x {width} pixels has no stable size between min_pixels ({settings.min_pixels}) and"
            f" max_pixels ({settings.max_pixels}): set them further apart"
        )
    return size


def _smart_resize(height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
    if max(height, width) > _MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"an image of {height} x {width} pixels has an aspect ratio over {_MAX_ASPECT_RATIO}")
    factor = settings.factor
    area = round(height / factor) * round(width / factor) * factor**2
    if area > settings.max_pixels:
        shrink = math.sqrt(height * width / settings.max_pixels)
        return (
            max(factor, math.floor(height / shrink / factor) * factor),
            max(factor, math.floor(width / shrink / factor) * factor),
        )
    if area < settings.min_pixels:
        grow = math.sqrt(settings.min_pixels / (height * width))
        return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)


def grid_of(height: int, width: int, settings: ImageSettings) -> GridTHW:
    """Patches of a picture of this original size, once it is resized."""
    height, width = resized_size(height, width, settings)
    return 1, height // settings.patch_size, width // settings.patch_size


def prepare(image: Image.Image, settings: ImageSettings) -> ImageInput:
    """Resizes an RGB picture once, for every engine (bicubic, as the model's own processor)."""
    height, width = resized_size(image.height, image.width, settings)
    pixels = np.array(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.uint8)
    key = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
    return ImageInput(key, pixels, (1, height // settings.patch_size, width // settings.patch_size))


def pixel_values(images: Sequence[ImageInput], settings: ImageSettings) -> tuple[torch.Tensor, list[GridTHW]]:
    """Float32 patches [sum of patches, 3 * temporal_patch_size * patch_size ** 2] as the Hugging Face processor lays them out, and grids.

    Patches of one merge window stand side by side; a still picture fills every temporal slot of its patch.
    """
    rows = [_patches(image, settings) for image in images]
    width = 3 * settings.temporal_patch_size * settings.patch_size**2
    return torch.cat(rows) if rows else torch.empty(0, width), [image.grid_thw for image in images]


def _patches(image: ImageInput, settings: ImageSettings) -> torch.Tensor:
    patch, merge = settings.patch_size, settings.merge_size
    _, rows, columns = image.grid_thw
    channels = torch.tensor(image.pixels).permute(2, 0, 1).to(torch.float32)
    mean, std = (torch.tensor(values).mul(_RGB_MAX).view(3, 1, 1) for values in (settings.mean, settings.std))
    normalised = (channels - mean) / std
    windows = normalised.view(3, rows // merge, merge, patch, columns // merge, merge, patch).permute(1, 4, 2, 5, 0, 3, 6)
    filled = windows.unsqueeze(5).expand(*windows.shape[:5], settings.temporal_patch_size, patch, patch)
    return filled.reshape(rows * columns, -1)


def expand_image_tokens(token_ids: Sequence[int], grids: Sequence[GridTHW], image_token_id: int, merge_size: int) -> list[int]:
    """Repeats the k-th image token once per merged patch of the k-th grid; ValueError when their numbers differ.

    Example: expand_image_tokens([5, 9, 6], [(1, 4, 4)], image_token_id=9, merge_size=2) == [5, 9, 9, 9, 9, 6]
    """
    if (found := sum(token == image_token_id for token in token_ids)) != len(grids):
        raise ValueError(f"the prompt has {found} image tokens (id {image_token_id}) but {len(grids)} images")
    remaining = iter(grids)
    expanded: list[int] = []
    for token in token_ids:
        repeats = math.prod(next(remaining)) // merge_size**2 if token == image_token_id else 1
        expanded.extend([token] * repeats)
    return expanded
