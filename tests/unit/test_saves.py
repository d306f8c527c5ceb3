"""What a save brings back to the train engine, what it takes on disk, and what is left when it cannot be written."""

from __future__ import annotations

import random
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mindspeed_mm_rl.algorithms.kl import KLController
from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.data.loader import PromptLoader
from mindspeed_mm_rl.platforms import device
from mindspeed_mm_rl.trainer.resume import Start, start_of
from mindspeed_mm_rl.trainer.save_folder import TRACKER, SaveFolder, check_whole
from mindspeed_mm_rl.trainer.state import RunState, save_bytes, size_text
from tests.data_files import row, write_rows
from tests.disks import small_disk
from tests.plans import optimizer_plan, train_plan, whole_plan


class Trainer:
    """The train engine in this process, where a run has a group of workers."""

    def __init__(self, **changes: object) -> None:
        from mindspeed_mm_rl.engines.megatron.engine import MegatronTrainEngine

        self.engine = MegatronTrainEngine(train_plan(**changes), with_reference=False, entropy_bonus=False, publish_vision=True)

    def save(self, folder: str) -> None:
        self.engine.save(Path(folder))

    def step(self, seed: int) -> None:
        """One optimizer step on a random gradient."""
        generator = torch.Generator().manual_seed(seed)
        self.engine.models[0].zero_grad_buffer()
        for parameter in self.engine.policy.parameters():
            if parameter.requires_grad:
                parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        self.engine.schedule.step(1)
        self.engine.optimizer.step()


@pytest.fixture
def plan(tiny_text: Path, one_rank: None, tmp_path: Path) -> Plan:
    data = write_rows(tmp_path / "train.parquet", [row(text=f"Is it {number}?", images=[]) for number in range(6)])
    plan = whole_plan(tiny_text, data, tmp_path)
    return replace(plan, train=replace(plan.train, freeze_vision=False, freeze_projector=False))


def save(plan: Plan, trainer: Trainer, iteration: int) -> Path:
    loader = PromptLoader(plan.data)
    try:
        return RunState(Start(plan), iteration).save({"actor": trainer}, loader, KLController(0.1))
    finally:
        loader.close()


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def moments(trainer: Trainer) -> list[torch.Tensor]:
    return [value for state in trainer.engine.optimizer.optimizer.state.values() for value in (state["exp_avg"], state["exp_avg_sq"])]


def test_random_states_optimizer_and_schedule_come_back(tiny_text: Path, one_rank: None, tmp_path: Path) -> None:
    schedule = {"optimizer": optimizer_plan(lr_decay_style="linear", warmup_updates=2, decay_updates=10)}
    trainer, other, new = (
        Trainer(folder=tiny_text, **schedule, **change) for change in ({}, {}, {"no_load_optim": True, "no_load_rng": True})
    )
    device.seed_everything(11)
    draws()
    trainer.step(1)
    trainer.step(2)
    trainer.save(str(tmp_path))
    expected = draws()
    trainer.step(3)

    device.seed_everything(12)
    other.engine.load(tmp_path)
    assert draws() == expected
    assert len(moments(other)) > 20 and all(float(moment.abs().sum()) > 0 for moment in moments(other))
    other.step(3)
    for left, right in zip(moments(trainer), moments(other), strict=True):
        assert torch.equal(left, right)
    assert trainer.engine.schedule.num_steps == other.engine.schedule.num_steps == 3
    assert trainer.engine.optimizer.param_groups[0]["lr"] == other.engine.optimizer.param_groups[0]["lr"]

    device.seed_everything(12)
    unchanged = draws()
    device.seed_everything(12)
    new.engine.load(tmp_path)
    assert draws() == unchanged != expected
    assert new.engine.schedule.num_steps == 0 and not any(float(moment.abs().sum()) > 0 for moment in moments(new))


_DISTRIBUTED = {"optimizer": optimizer_plan(use_distributed_optimizer=True)}


@pytest.mark.parametrize(
    "changes",
    [{}, {"dtype": "bfloat16"}, _DISTRIBUTED, {"dtype": "bfloat16"} | _DISTRIBUTED],
    ids=["float32", "bfloat16", "float32_distributed", "bfloat16_distributed"],
)
def test_a_network_that_rested_goes_on(tiny_text: Path, one_rank: None, tmp_path: Path, changes: dict) -> None:
    """The actor before its first step, while the critic warms up: the optimizer has nothing to save yet."""
    trainer, other = (Trainer(folder=tiny_text, **changes) for _ in range(2))
    with torch.no_grad():
        for parameter in trainer.engine.policy.parameters():
            parameter.add_(0.5)
    trainer.engine.optimizer.reload_model_params()
    trainer.save(str(tmp_path))
    other.engine.load(tmp_path)
    for seed in (1, 2):
        trainer.step(seed)
        other.step(seed)
    for (name, left), right in zip(trainer.engine.policy.named_parameters(), other.engine.policy.parameters(), strict=True):
        assert torch.equal(left, right), name


def size_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}], ids=["float32", "bfloat16"])
def test_a_save_takes_what_was_announced(plan: Plan, tiny_text: Path, changes: dict) -> None:
    plan = replace(plan, train=replace(plan.train, **changes))
    trainer = Trainer(folder=tiny_text, **changes)
    trainer.step(1)
    assert size_on_disk(save(plan, trainer, 1)) == pytest.approx(save_bytes(plan), rel=0.1)


def test_sizes_as_text() -> None:
    assert [size_text(number) for number in (0, 3000, 5 << 19, 3 << 29)] == ["0 KiB", "3 KiB", "2.5 MiB", "1.5 GiB"]


def check_only_the_first_is_there(saves: SaveFolder, plan: Plan) -> None:
    assert sorted(path.name for path in saves.root.iterdir()) == ["iter_0000001", TRACKER]
    assert (saves.root / TRACKER).read_text() == "1\n"
    check_whole(saves.path_of(1))
    assert start_of(plan).save == saves.path_of(1)


def test_a_full_disk(plan: Plan, tiny_text: Path, tmp_path: Path) -> None:
    trainer = Trainer(folder=tiny_text)
    trainer.step(1)
    with small_disk(tmp_path / "disk", save_bytes(plan) * 3 // 2) as disk:
        plan = replace(plan, run=replace(plan.run, save=str(disk / "save")))
        saves = SaveFolder(disk / "save")
        save(plan, trainer, 1)
        for iteration in (2, 1):
            with pytest.raises(RuntimeError) as error:
                save(plan, trainer, iteration)
            assert str(error.value).startswith(
                f"iteration {iteration} could not be saved: no space left in {saves.root}, a save takes about "
            )
            assert size_text(save_bytes(plan)) in str(error.value)
            check_only_the_first_is_there(saves, plan)


def test_a_disk_that_became_read_only(plan: Plan, tiny_text: Path, tmp_path: Path) -> None:
    trainer = Trainer(folder=tiny_text)
    with small_disk(tmp_path / "disk", 64 << 20) as disk:
        plan = replace(plan, run=replace(plan.run, save=str(disk / "save")))
        save(plan, trainer, 1)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(RuntimeError) as error:
            save(plan, trainer, 2)
        assert str(error.value) == f"iteration 2 could not be saved: {disk / 'save'} is on a read-only file system; make it writable"
        SaveFolder(disk / "save").mend()
        check_only_the_first_is_there(SaveFolder(disk / "save"), plan)
