"""A conversion that is killed, or has no room, leaves nothing that looks whole; the next one succeeds."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoint.convert_cli import main
from tests.convert.families import same, weights
from tests.convert.layouts import Choice, to_hf, to_mm
from tests.disks import small_disk

KILLS = 10


def in_a_process(work: Callable[[], object]) -> int:
    """Process id of a fork that works and ends."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def killed(work: Callable[[], object], after: float) -> bool:
    """Whether the process still worked after so many seconds, when it was killed."""
    child = in_a_process(work)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("way", ["hf_to_mm", "mm_to_hf"])
def test_killed_at_any_moment(way: str, model: Callable[..., Path], tmp_path: Path) -> None:
    source = model("qwen2_5_vl", dtype=torch.bfloat16)
    choice = Choice(llm=((2, 2),), vit=((4, 0),), tp=2)
    whole = to_mm(source, tmp_path / "whole", choice)
    target = tmp_path / "out" / "model"

    def convert() -> None:
        to_mm(source, target, choice) if way == "hf_to_mm" else to_hf(whole, source, target, choice)

    started = time.monotonic()
    assert os.waitpid(in_a_process(convert), 0)[1] == 0
    duration = time.monotonic() - started
    target.rename(tmp_path / "expected")
    rng, hits = random.Random(7), 0
    while hits < KILLS:
        if not killed(convert, rng.uniform(0, duration)):
            target.rename(tmp_path / f"finished-{time.monotonic_ns()}")
            continue
        hits += 1
        # The one thing that may be left bears the name of something unfinished; a killed rename may also have happened.
        assert {path.name for path in target.parent.iterdir()} <= {"model", ".model.incomplete"}
        if target.exists():
            assert_whole(way, target, source, choice)
            target.rename(tmp_path / f"renamed-{hits}")
    convert()
    assert_whole(way, target, source, choice)
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def assert_whole(way: str, folder: Path, source: Path, choice: Choice) -> None:
    if way == "mm_to_hf":
        assert same(weights(folder), weights(source))
    else:
        assert main(["verify", str(folder), str(source)]) == 0


def test_two_at_a_time_do_not_mix(model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    work = tmp_path / ".model.incomplete"
    work.mkdir()
    held = os.open(work, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    arguments = ["hf_to_mm", "--cfg.hf_config.hf_dir", str(model("qwen2")), "--cfg.mm_dir", str(tmp_path / "model")]
    assert main(arguments) == 2
    assert "another mm-convert is writing" in capsys.readouterr().err
    os.close(held)
    assert main(arguments) == 0


@pytest.mark.parametrize("way", ["hf_to_mm", "mm_to_hf", "hf_to_mm_dcp"])
def test_a_full_disk_ends_in_one_sentence(way: str, model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = model("qwen2_5_vl")
    whole = to_mm(source, tmp_path / "whole", Choice())
    with small_disk(tmp_path / "disk", 200_000) as disk:
        arguments = ["--cfg.hf_config.hf_dir", str(source), "--cfg.mm_dir", str(disk / "out")]
        if way == "mm_to_hf":
            arguments = ["--cfg.hf_config.hf_dir", str(source), "--cfg.mm_dir", str(whole), "--cfg.save_hf_dir", str(disk / "out")]
        assert main([way, *arguments]) == 2
        message = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mm-convert: ")]
        assert len(message) == 1 and ("No space left" in message[0] or "could not be written" in message[0] or "has room for" in message[0])
        assert not list(disk.iterdir())
