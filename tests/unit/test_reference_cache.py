"""What the reference said of pairs is found again, whatever happened to the process that wrote it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mindspeed_mm_rl.trainer.reference_cache import PairLogprobs, ReferenceCache, cache_folder
from tests.plans import train_plan


def key_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def logprobs(number: int) -> PairLogprobs:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(1 + number % 4, generator=generator), torch.randn(2 + number % 3, generator=generator)


def check(cache: ReferenceCache, numbers: range) -> None:
    for number in numbers:
        assert all(torch.equal(found, wanted) for found, wanted in zip(cache.get(key_of(number)), logprobs(number), strict=True))


def filled(folder: Path, numbers: range) -> ReferenceCache:
    cache = ReferenceCache(folder)
    for number in numbers:
        cache.add(key_of(number), logprobs(number))
    return cache


def test_pairs_are_found_before_and_after_they_are_written(tmp_path: Path) -> None:
    cache = filled(tmp_path, range(7))
    check(cache, range(7))
    assert not list(tmp_path.iterdir())
    cache.flush()
    check(cache, range(7))
    later = filled(tmp_path, range(7, 9))
    later.flush()
    again = ReferenceCache(tmp_path)
    check(again, range(9))
    assert len(again) == 9 and key_of(8) in again and key_of(9) not in again
    with pytest.raises(KeyError):
        again.get(key_of(9))


def test_many_pairs_are_written_on_the_way(tmp_path: Path) -> None:
    filled(tmp_path, range(1100))
    # Killed here: nobody flushed.
    found = ReferenceCache(tmp_path)
    assert len(found) == 1024
    check(found, range(0, 1024, 100))


def test_half_a_block_is_no_block(tmp_path: Path) -> None:
    filled(tmp_path, range(5)).flush()
    filled(tmp_path, range(5, 10)).flush()
    first, _ = sorted(tmp_path.iterdir())
    kept = len(first.read_bytes())
    (tmp_path / "beef.partial").write_bytes(first.read_bytes()[: kept // 2])
    first.write_bytes(first.read_bytes()[: kept // 2])
    cache = ReferenceCache(tmp_path)
    assert len(cache) == 5
    missing = [number for number in range(10) if key_of(number) not in cache]
    check(filled(tmp_path, range(missing[0], missing[0] + 5)), range(10))
    assert not list(tmp_path.glob("*.partial"))


def test_nothing_is_found_under_other_weights_another_model_another_type_or_other_pixels(tiny_text: Path, tmp_path: Path) -> None:
    plan = train_plan(tiny_text)
    (tmp_path / "config.json").write_text((tiny_text / "config.json").read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    folders = {
        cache_folder(tmp_path, plan, "a"),
        cache_folder(tmp_path, plan, "b"),
        cache_folder(tmp_path, replace(plan, dtype="bfloat16"), "a"),
        cache_folder(tmp_path, replace(plan, hf_path=str(tmp_path)), "a"),
    }
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    folders.add(cache_folder(tmp_path, replace(plan, hf_path=str(tmp_path)), "a"))
    assert len(folders) == 5 and cache_folder(tmp_path, replace(plan, seed=8), "a") in folders
