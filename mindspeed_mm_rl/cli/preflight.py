"""Looks at everything a run will open, before any process is started: what is wrong is said in one sentence, not after an hour."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from mindspeed_mm_rl.algorithms.filters import check_metric, metric_name
from mindspeed_mm_rl.config.check import check_offered
from mindspeed_mm_rl.config.plan import DataPlan, Plan, TrainPlan
from mindspeed_mm_rl.data.loader import PromptLoader
from mindspeed_mm_rl.models.families import read_architecture
from mindspeed_mm_rl.models.weight_files import WeightFolder, check_weights, read_config
from mindspeed_mm_rl.rewards.registry import check_verifiers, score_names


def preflight(plan: Plan) -> Iterator[str]:
    """One line per thing that was found in order; raises ValueError for the first one that isn't."""
    check_offered(plan)
    _rewards(plan)
    _output_folders(plan)
    yield _weights(plan)
    yield _data(plan.data)


def _rewards(plan: Plan) -> None:
    check_verifiers(plan.reward.verifiers)
    if plan.recipe.filter_groups:
        check_metric(metric_name(plan.recipe.filter_metric), score_names(plan.reward.verifiers))


def _output_folders(plan: Plan) -> None:
    for key, folder in (("actor_config.save", plan.run.save), ("rl_config.output", plan.run.output)):
        if not folder:
            continue
        existing = next(path for path in (Path(folder), *Path(folder).parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ValueError(f"{key}: {folder} can't be written to ({existing} is {'read-only' if existing.is_dir() else 'a file'})")


def _weights(plan: Plan) -> str:
    train = plan.train
    if not Path(train.hf_path).is_dir():
        raise ValueError(f"megatron_training.tokenizer_name_or_path: {train.hf_path} is not a folder; give a Hugging Face folder")
    config = read_config(train.hf_path)
    read_architecture(train.hf_path)
    found = _checked("actor_config.load", train.load, config)
    if found.kind == "training" and not train.finetune:
        _resumable(plan, found.iteration)
    if plan.recipe.kl_coef and train.reference_load != train.load:
        _checked("rl_config.integrated_mode_config.ref_model_load_path", train.reference_load, config)
    kind = {"hf": "Hugging Face weights", "mm": "mm-convert weights", "training": f"training save of iteration {found.iteration}"}
    return f"weights: {kind[found.kind]} in {found.weights}"


def _checked(key: str, folder: str, config: dict[str, Any]) -> WeightFolder:
    try:
        return check_weights(folder, config)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _resumable(plan: Plan, iteration: int | None) -> None:
    train: TrainPlan = plan.train
    if plan.recipe.kl_coef and train.reference_load == train.load:
        raise ValueError(
            f"actor_config.load ({train.load}) is a training save and a KL term is on: give the weights that training started from in "
            "rl_config.integrated_mode_config.ref_model_load_path"
        )
    if iteration is not None and iteration >= plan.run.train_iters:
        raise ValueError(
            f"actor_config.load ({train.load}) is at iteration {iteration} and megatron_training.train_iters is {plan.run.train_iters}: "
            "nothing is left to train; raise train_iters"
        )


def _data(plan: DataPlan) -> str:
    with closing(PromptLoader(plan)) as loader:
        report = loader.scan()
    dropped = f", {report.too_long} too long (max_prompt_length {plan.max_prompt_length})" if report.too_long else ""
    bad = f", {len(report.bad_rows)} bad (skip_bad_rows), the first: {report.bad_rows[0]}" if report.bad_rows else ""
    return f"data: {report.usable} of {report.rows} rows usable, longest prompt {report.longest_prompt} tokens{dropped}{bad}"
