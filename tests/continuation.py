"""Some iterations straight, and the same with a stop half way: everything that must come out the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.sinks import read_records
from mindspeed_mm_rl.trainer import build, compare, rl
from mindspeed_mm_rl.trainer.save_folder import TRACKER
from mindspeed_mm_rl.types import Batch
from tests.data_files import png, row, write_rows
from tests.plans import optimizer_plan, whole_plan

ITERATIONS, STOP_AFTER = 4, 2
_NOT_COMPARED = ("timing/", "memory/")
_NOT_COMPARED_ENDINGS = ("tps", "per_second")


@dataclass
class Result:
    """What one way through the iterations left."""

    records: list[dict[str, float]]
    batches: list[Batch]
    tensors: dict[str, torch.Tensor]
    """Of the last save: weights and optimizer state of actor and critic, by folder and key."""
    common: dict[str, Any]
    """Of the last save: schedule, random states, the optimizer's settings, by folder."""
    state: dict[str, Any]


def grpo_with_kl(plan: Plan) -> Plan:
    """Two epochs of shuffled mini-batches, a KL coefficient that moves, a learning rate that first rises and then falls."""
    recipe = replace(plan.recipe, algorithm="grpo", clip_ratio_high=0.2, token_level_loss=False)
    return replace(
        plan,
        run=replace(plan.run, epochs=2, shuffle_mini_batch=True),
        recipe=replace(recipe, kl_coef=0.05, kl_ctrl_type="adaptive", kl_target=1e-4, kl_horizon=100.0),
    )


def dapo_with_refill(plan: Plan) -> Plan:
    """Random models are never right: the overlong penalty alone makes rewards differ, so most groups are filtered out and refilled."""
    return replace(
        plan,
        run=replace(plan.run, prompts_per_generation=6, samples_per_prompt=6),
        recipe=replace(plan.recipe, filter_groups=True, filter_max_batches=-1, train_prompts=4),
    )


def ppo_with_kl(plan: Plan) -> Plan:
    """A critic with an optimizer of its own, and a KL term in the reward whose coefficient moves."""
    recipe = replace(plan.recipe, algorithm="ppo", clip_ratio_high=0.2, kl_penalty="kl", use_kl_in_reward=True)
    optimizer = optimizer_plan(lr=5e-3, lr_decay_style="linear", decay_updates=16, weight_decay=0.01, clip_grad=0.5)
    return replace(
        plan,
        run=replace(plan.run, epochs=2, shuffle_mini_batch=True),
        recipe=replace(recipe, kl_coef=0.05, kl_ctrl_type="adaptive", kl_target=1e-4, kl_horizon=100.0),
        critic=replace(plan.train, optimizer=optimizer),
    )


def continuation_plan(folder: Path, train_path: Path, output: Path, num_devices: int) -> Plan:
    plan = whole_plan(folder, train_path, output)
    optimizer = optimizer_plan(lr=2e-3, lr_decay_style="linear", warmup_updates=3, decay_updates=16, weight_decay=0.01)
    return replace(
        plan,
        run=replace(plan.run, train_iters=ITERATIONS, save_interval=STOP_AFTER, num_devices=num_devices),
        train=replace(plan.train, optimizer=optimizer),
        reward=replace(plan.reward, overlong_buffer=20),
    )


def dpo(plan: Plan) -> Plan:
    """17 pairs, 6 an iteration: an epoch ends in the middle of the third. plan: of tests.plans.pairs_plan."""
    optimizer = optimizer_plan(lr=2e-3, lr_decay_style="linear", warmup_updates=3, decay_updates=8, weight_decay=0.01)
    return replace(
        plan,
        run=replace(plan.run, train_iters=ITERATIONS, save_interval=STOP_AFTER, prompts_per_generation=6, mini_batch_prompts=3),
        train=replace(plan.train, optimizer=optimizer),
    )


def picture_rows(path: Path) -> Path:
    """17 rows, so that epochs end in the middle of an iteration: a picture, two pictures, none, in turn."""
    rows = []
    for number in range(17):
        images = [png(42 + 14 * (number % 5), 56 + 14 * k, seed=10 * number + k) for k in range((1, 2, 0)[number % 3])]
        rows.append(row(text="<image>" * len(images) + f"Find x, number {number}.", images=images, answer=str(number)))
    return write_rows(path, rows)


@contextmanager
def watching() -> Iterator[list[Batch]]:
    """Collects every batch that the trainer makes, of groups or of pairs: its samples, tokens and log-probs."""
    batches: list[Batch] = []

    def watched(made_by: Callable[..., Batch], *arguments: Any) -> Batch:
        batches.append(made_by(*arguments))
        return batches[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl, "to_batch", partial(watched, rl.to_batch))
        patch.setattr(compare, "batch_of_pairs", partial(watched, compare.batch_of_pairs))
        yield batches


def straight(plan: Plan) -> Result:
    with watching() as batches:
        build.run(plan)
    return _result(plan, batches)


def stopped_and_resumed(plan: Plan) -> Result:
    """The optimizer's plan stays that of all iterations: it is a stop, not a shorter run."""
    with watching() as batches:
        build.run(replace(plan, run=replace(plan.run, train_iters=STOP_AFTER)))
        assert len(read_records(Path(plan.run.output) / "metrics.jsonl")) == STOP_AFTER
        build.run(plan)
    return _result(plan, batches)


def resumed_from(plan: Plan, other: Plan, iteration: int, batches: list[Batch]) -> Result:
    """What a stop of `plan`'s run after that iteration left, copied and gone on with as `other`; one run less than stopping it.

    batches: those of `plan`'s run.
    """
    save = f"iter_{iteration:07d}"
    shutil.copytree(Path(plan.run.save) / save, Path(other.run.save) / save)
    (Path(other.run.save) / TRACKER).write_text(f"{iteration}\n")
    shutil.copytree(plan.run.output, other.run.output)
    with watching() as later:
        build.run(other)
    return _result(other, batches[:iteration] + later)


def _result(plan: Plan, batches: list[Batch]) -> Result:
    save = Path(plan.run.save) / f"iter_{plan.run.train_iters:07d}"
    networks = [folder.name for folder in sorted(save.iterdir()) if folder.is_dir()]
    assert networks == ["actor", *(["critic"] if plan.critic else []), *(["vision"] if plan.vision else [])]
    return Result(
        records=read_records(Path(plan.run.output) / "metrics.jsonl"),
        batches=batches,
        tensors={f"{name}/{key}": tensor for name in networks for key, tensor in saved_tensors(save / name).items()},
        common={name: torch.load(save / name / "common.pt", weights_only=False) for name in networks},
        state=json.loads((save / "state.json").read_text()),
    )


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    stored = distributed_checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {key: torch.empty(m.size, dtype=m.properties.dtype) for key, m in stored.items() if isinstance(m, TensorStorageMetadata)}
    distributed_checkpoint.load(tensors, checkpoint_id=folder)
    return tensors


def check_same(one: Result, other: Result) -> None:
    """Bit for bit, but for what measures time."""
    iterations = list(range(1, one.state["iteration"] + 1))
    assert [record["iteration"] for record in one.records] == [record["iteration"] for record in other.records] == iterations
    for left, right in zip(one.records, other.records, strict=True):
        assert compared(left) == compared(right)
    _check_batches(one.batches, other.batches)
    assert one.tensors.keys() == other.tensors.keys()
    for part in ("model.", "optimizer."):
        assert all(any(key.startswith(f"{name}/{part}") for key in one.tensors) for name in one.common), part
    for key, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[key]), key
    _check_nested(one.common, other.common, "common")
    for key in ("iteration", "data", "kl_controller"):
        assert one.state[key] == other.state[key], key


def compared(record: Mapping[str, float]) -> dict[str, float]:
    return {
        name: value for name, value in record.items() if not name.startswith(_NOT_COMPARED) and not name.endswith(_NOT_COMPARED_ENDINGS)
    }


def _check_batches(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other) > 0
    for left, right in zip(one, other, strict=True):
        assert left.sample_ids == right.sample_ids and left.image_keys == right.image_keys and left.rewards == right.rewards
        for column in ("prompts", "responses", "rollout_logprobs"):
            a, b = getattr(left, column), getattr(right, column)
            assert a.lengths == b.lengths and torch.equal(a.values, b.values), column


def _check_nested(one: Any, other: Any, where: str) -> None:
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, Mapping):
        assert one.keys() == other.keys(), where
        for key in one:
            _check_nested(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            _check_nested(*pair, f"{where}.{number}")
    else:
        assert one == other, where
