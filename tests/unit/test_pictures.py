"""Pictures of an iteration: each distinct one is encoded once, by whoever has least to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_mm_rl.trainer.pictures import SharedPictures
from mindspeed_mm_rl.types import ImageInput, Prompt
from mindspeed_mm_rl.workers import encoding
from mindspeed_mm_rl.workers.encoding import EncodedTables
from mindspeed_mm_rl.workers.failure import Member
from tests.pictures import pictures
from tests.plans import train_plan


class Tables:
    """An encoder whose tables are numbers, two for every call: of the first picture, and of the others."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def encode(self, images: dict[str, ImageInput]) -> EncodedTables:
        self.calls.append(list(images))
        number = 10 * len(self.calls)
        return EncodedTables({key: number + min(index, 1) for index, key in enumerate(images)}, len(images))


@pytest.fixture(scope="module")
def images(tiny_vl: Path) -> list[ImageInput]:
    return list(pictures(tiny_vl, ((56, 56), (84, 56), (112, 84), (140, 196))).values())


def prompts(*chosen: tuple[ImageInput, ...]) -> list[Prompt]:
    return [Prompt(number, [5], 5, images, answer="") for number, images in enumerate(chosen)]


def test_a_picture_that_is_drawn_again_is_not_encoded_again(images: list[ImageInput]) -> None:
    encoder, (a, b, c, d) = Tables(), images
    shared = SharedPictures(encoder)
    assert shared.of(prompts((a, b), (a,), ())) == [10, 11]
    assert shared.of(prompts((b,), (c, a, d), (c,))) == [11, 20, 10, 21], "the tables that these prompts look at"
    assert shared.of(prompts((d,))) == [21]
    assert encoder.calls == [[a.key, b.key], [c.key, d.key]]
    assert (shared.num_distinct, shared.num_encoded, shared.tables()) == (4, 4, [10, 11, 20, 21])


def test_prompts_without_pictures_ask_nobody(images: list[ImageInput]) -> None:
    encoder = Tables()
    shared = SharedPictures(encoder)
    assert (shared.of(prompts((), ())), shared.tables(), encoder.calls, shared.num_distinct) == ([], [], [], 0)


def test_pictures_are_dealt_by_patches(images: list[ImageInput]) -> None:
    """16, 24, 48 and 140 patches: the largest alone, the others together."""
    by_key = {image.key: image for image in images}
    a, b, c, d = by_key
    assert encoding.dealt(by_key, 2) == [[d], [a, b, c]]
    assert encoding.dealt({a: by_key[a]}, 2) == [[a], []]


def test_processes_that_share_an_encoder(tmp_path: Path) -> None:
    """Ranks count tensor parallel first and pipeline stages last; only the first stage has the encoder."""
    members = [Member("rank", number, None) for number in range(8)]
    plan = train_plan(tmp_path, tensor_parallel_size=2, pipeline_parallel_size=2)
    assert [[member.number for member in copy] for copy in encoding.replicas(members, plan)] == [[0, 1], [2, 3]]
    assert len(encoding.replicas(members, train_plan(tmp_path, context_parallel_size=2))) == 8, "each has the whole encoder"
