"""Pictures: sizes, patches and tokens as the Hugging Face processor of Qwen2.5-VL has them; corrupt bytes are named."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from mindspeed_mm_rl.data.images import (
    ImageSettings,
    check_image,
    expand_image_tokens,
    grid_of,
    load_image,
    pixel_values,
    prepare,
    read_image_settings,
    resized_size,
)
from tests.data_files import PREPROCESSOR, make_hf_folder, png

SETTINGS = ImageSettings(
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    mean=tuple(PREPROCESSOR["image_mean"]),
    std=tuple(PREPROCESSOR["image_std"]),
    min_pixels=4 * 784,
    max_pixels=64 * 784,
)
SIZES = ((56, 84), (300, 200), (30, 31), (71, 900), (1000, 999))


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    from transformers import AutoImageProcessor

    import mindspeed_mm_rl  # noqa: F401 - makes torchvision importable beside a CPU torch

    folder = make_hf_folder(tmp_path_factory.mktemp("hf"))
    return AutoImageProcessor.from_pretrained(folder, min_pixels=SETTINGS.min_pixels, max_pixels=SETTINGS.max_pixels, use_fast=True)


def test_resized_size_by_hand():
    # 280 x 196 is 10 x 7 merged patches of 28 pixels: 70 > 64. Shrunk by sqrt(70 / 64) = 1.0458: 267.7 x 187.4, floored to 9 x 6.
    assert resized_size(280, 196, SETTINGS) == (252, 168)
    # 28 x 28 is one merged patch, four are asked for: grown by 2.
    assert resized_size(28, 28, SETTINGS) == (56, 56)
    # Within the bounds: nearest multiples of 28.
    assert resized_size(100, 129, SETTINGS) == (112, 140)


def test_resizing_again_changes_nothing_and_stays_in_bounds():
    rng = np.random.default_rng(0)
    for height, width in rng.integers(8, 1500, (300, 2)).tolist():
        size = resized_size(height, width, SETTINGS)
        assert resized_size(*size, SETTINGS) == size
        assert SETTINGS.min_pixels <= size[0] * size[1] <= SETTINGS.max_pixels
        assert size[0] % 28 == size[1] % 28 == 0


def test_a_size_without_a_fixed_point_is_refused():
    # At least 5 merged patches and at most 5: 56 x 56 grows to 84 x 84, which is 9 > 5.
    narrow = ImageSettings(14, 2, 2, SETTINGS.mean, SETTINGS.std, min_pixels=5 * 784, max_pixels=5 * 784)
    with pytest.raises(ValueError, match="no stable size"):
        resized_size(56, 56, narrow)


def test_thin_images_are_refused():
    with pytest.raises(ValueError, match="aspect ratio over 200"):
        resized_size(2010, 10, SETTINGS)


def test_pixel_values_equal_the_hugging_face_processor(processor):
    prepared = [prepare(load_image(png(height, width, seed)), SETTINGS) for seed, (height, width) in enumerate(SIZES)]
    ours, grids = pixel_values(prepared, SETTINGS)
    theirs = processor(images=[Image.fromarray(image.pixels) for image in prepared], return_tensors="pt")
    assert grids == [tuple(grid) for grid in theirs["image_grid_thw"].tolist()]
    assert ours.shape == theirs["pixel_values"].shape
    assert torch.equal(ours, theirs["pixel_values"])


def test_sizes_of_original_images_equal_the_hugging_face_processor(processor):
    theirs = processor(images=[Image.new("RGB", (width, height)) for height, width in SIZES], return_tensors="pt")["image_grid_thw"]
    assert [grid_of(height, width, SETTINGS) for height, width in SIZES] == [tuple(grid) for grid in theirs.tolist()]


def test_resized_pixels_are_close_to_the_hugging_face_processor(processor):
    image = load_image(png(300, 200))
    ours, _ = pixel_values([prepare(image, SETTINGS)], SETTINGS)
    theirs = processor(images=[image], return_tensors="pt")["pixel_values"]
    # Two implementations of bicubic rounding to 8 bits: one grey level is 1 / 255 / 0.26 = 0.015.
    assert (ours - theirs).abs().max() < 0.04


def test_first_patch_by_hand():
    pixels = np.arange(56 * 56 * 3, dtype=np.int64).reshape(56, 56, 3) % 251
    ours, grids = pixel_values([prepare(Image.fromarray(pixels.astype(np.uint8)), SETTINGS)], SETTINGS)
    assert grids == [(1, 4, 4)]
    assert ours.shape == (16, 3 * 2 * 14 * 14)
    red = (pixels[:14, :14, 0] / 255 - SETTINGS.mean[0]) / SETTINGS.std[0]
    first = ours[0].view(3, 2, 14, 14)
    torch.testing.assert_close(first[0, 0], torch.tensor(red, dtype=torch.float32), atol=1e-5, rtol=0)
    assert torch.equal(first[:, 0], first[:, 1])
    # Third row: the patch below the first one, since a merge window's four patches stand together.
    green = (pixels[14:28, :14, 1] / 255 - SETTINGS.mean[1]) / SETTINGS.std[1]
    torch.testing.assert_close(ours[2].view(3, 2, 14, 14)[1, 0], torch.tensor(green, dtype=torch.float32), atol=1e-5, rtol=0)


def test_no_images_give_no_patches():
    ours, grids = pixel_values([], SETTINGS)
    assert ours.shape == (0, 1176)
    assert grids == []


def test_expand_image_tokens_by_hand():
    # Grids of 1 x 2 x 4 and 1 x 4 x 4 patches: 2 and 4 tokens.
    assert expand_image_tokens([7, 9, 8, 9], [(1, 2, 4), (1, 4, 4)], image_token_id=9, merge_size=2) == [7, 9, 9, 8, 9, 9, 9, 9]
    assert expand_image_tokens([7, 8], [], image_token_id=9, merge_size=2) == [7, 8]
    with pytest.raises(ValueError, match="2 image tokens .id 9. but 1 images"):
        expand_image_tokens([9, 9], [(1, 4, 4)], image_token_id=9, merge_size=2)


def test_key_tells_pictures_apart():
    one, same, other = (prepare(load_image(png(56, 56, seed)), SETTINGS) for seed in (1, 1, 2))
    assert one.key == same.key != other.key
    # The same bytes in another shape are another picture.
    tall, wide = (prepare(Image.new("RGB", size), SETTINGS) for size in ((56, 112), (112, 56)))
    assert tall.key != wide.key
    assert tall.num_tokens(2) == 8 == SETTINGS.num_tokens(tall.grid_thw)


@pytest.mark.parametrize("check", [load_image, check_image])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_corrupt_images_are_refused(kind, check):
    good = png(120, 90, kind=kind)
    check(good)
    for bad in (b"", b"not an image", good[: len(good) // 2], good[:40]):
        with pytest.raises(ValueError, match=r"corrupt \([^<]+\)"):
            check(bad)


def test_a_flipped_bit_in_a_png_is_refused():
    bad = bytearray(png(120, 90))
    bad[len(bad) // 2] ^= 1
    for check in (load_image, check_image):
        with pytest.raises(ValueError, match="corrupt"):
            check(bytes(bad))


def _encoded(image: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return stream.getvalue()


def test_transparency_becomes_white_and_16_bit_grey_is_scaled():
    see_through = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert load_image(_encoded(see_through)).getpixel((0, 0)) == (255, 255, 255)
    grey = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    assert load_image(_encoded(grey)).getpixel((0, 0)) == (128, 128, 128)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30])
    assert load_image(_encoded(palette)).getpixel((0, 0)) == (10, 20, 30)
    assert load_image(_encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_photos_are_turned_upright():
    lying = Image.new("RGB", (80, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    lying.save(stream, "JPEG", exif=exif)
    assert load_image(stream.getvalue()).size == (40, 80)


def test_settings_come_from_either_file_of_the_folder(tmp_path):
    with pytest.raises(ValueError, match="has no preprocessor_config.json"):
        read_image_settings(tmp_path, 1, 784)
    folder = make_hf_folder(tmp_path)
    settings = read_image_settings(folder, SETTINGS.min_pixels, SETTINGS.max_pixels)
    assert settings == SETTINGS
    classic = folder / "preprocessor_config.json"
    (folder / "processor_config.json").write_text('{"image_processor": ' + classic.read_text() + "}")
    classic.unlink()
    assert read_image_settings(folder, SETTINGS.min_pixels, SETTINGS.max_pixels) == SETTINGS


def test_settings_refuse_impossible_bounds(tmp_path):
    folder = make_hf_folder(tmp_path)
    for bounds in ((0, 784), (785, 784), (1, 783)):
        with pytest.raises(ValueError, match="min_pixels"):
            read_image_settings(folder, *bounds)
    (folder / "preprocessor_config.json").write_text('{"patch_size": 14}')
    with pytest.raises(ValueError, match="lacks temporal_patch_size, merge_size, image_mean, image_std"):
        read_image_settings(folder, 1, 784)


@pytest.mark.parametrize(("key", "value"), [("do_normalize", False), ("rescale_factor", 1 / 127.5), ("resample", 2)])
def test_settings_refuse_pixels_of_another_kind(tmp_path, key, value):
    """They would go through the encoder otherwise than the model was trained with, and the rollout engine would see the same wrong ones."""
    file = make_hf_folder(tmp_path) / "preprocessor_config.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps(written | {"do_normalize": None, "rescale_factor": 0.00392156862745098, "resample": 3}))
    assert read_image_settings(tmp_path, SETTINGS.min_pixels, SETTINGS.max_pixels) == SETTINGS
    file.write_text(json.dumps(written | {key: value}))
    with pytest.raises(ValueError, match=f"{key} .* is not offered; only"):
        read_image_settings(tmp_path, SETTINGS.min_pixels, SETTINGS.max_pixels)
