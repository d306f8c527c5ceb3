"""Looks at everything a run will open, before any process is started: what is wrong is said in one sentence, not after an hour."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mindspeed_mm_rl.algorithms.filters import check_metric, metric_name
from mindspeed_mm_rl.config.plan import DataPlan, Plan, RunPlan
from mindspeed_mm_rl.data.loader import PromptLoader, RowLoader, ScanReport
from mindspeed_mm_rl.data.pairs import PairLoader
from mindspeed_mm_rl.models.families import read_architecture
from mindspeed_mm_rl.models.names import PARTS, Part
from mindspeed_mm_rl.models.rope_scaling import read_rope_scaling
from mindspeed_mm_rl.models.value_weights import check_value_weights
from mindspeed_mm_rl.models.weight_files import WeightFolder, check_weights, read_config
from mindspeed_mm_rl.models.weight_sources import VISION_PARTS
from mindspeed_mm_rl.rewards.model import check_folder
from mindspeed_mm_rl.rewards.pool import check_functions
from mindspeed_mm_rl.rewards.registry import score_names
from mindspeed_mm_rl.rewards.scoring import RewardSettings
from mindspeed_mm_rl.trainer.evaluate import eval_data
from mindspeed_mm_rl.trainer.resume import Start, start_of
from mindspeed_mm_rl.trainer.save_folder import SaveFolder
from mindspeed_mm_rl.trainer.state import free_bytes, save_bytes, size_text


def begin(plan: Plan, dry_run: bool) -> Start:
    """Where the run begins; a dry run changes nothing in the folder of the saves. Raises ValueError for what no input can mend."""
    if not plan.preference:
        _rewards(plan)
    _output_folders(plan)
    if not Path(plan.train.hf_path).is_dir():
        raise ValueError(f"megatron_training.tokenizer_name_or_path: {plan.train.hf_path} is not a folder; give a Hugging Face folder")
    if plan.run.save and not dry_run:
        saves = SaveFolder(Path(plan.run.save))
        with saves.held():
            saves.mend()
    return start_of(plan)


def preflight(start: Start) -> Iterator[str]:
    """One line per thing that was found in order; raises ValueError for the first one that isn't."""
    yield _weights(start)
    _rope(start.plan)
    yield from (f"config.json: {note}" for note in read_architecture(start.plan.train.hf_path).notes)
    if start.plan.run.save:
        yield _space(start.plan)
    yield _data(start)
    yield from _eval_data(start.plan)


def evaluation_preflight(start: Start) -> Iterator[str]:
    """As preflight, for a run that only evaluates."""
    yield _weights(start)
    _rope(start.plan)
    yield from _eval_data(start.plan)


def _rewards(plan: Plan) -> None:
    settings = RewardSettings(**asdict(plan.reward))
    for source, rule in settings.rules.items() if plan.recipe.filter_groups else ():
        try:
            check_metric(metric_name(plan.recipe.filter_metric), score_names(rule.verifiers))
        except ValueError as error:
            raise ValueError(f"rl_config.verifier_by_source: {source}: {error}" if source else str(error)) from error
    if plan.reward.reward_model:
        check_folder(plan.reward.reward_model)
    for graded in (settings, *([RewardSettings(**asdict(plan.eval.reward))] if plan.eval else [])):
        check_functions(graded)


def _output_folders(plan: Plan) -> None:
    for key, folder in (("actor_config.save", plan.run.save), ("rl_config.output", plan.run.output)):
        if not folder:
            continue
        existing = next(path for path in (Path(folder), *Path(folder).parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ValueError(f"{key}: {folder} can't be written to ({existing} is {'read-only' if existing.is_dir() else 'a file'})")


def _weights(start: Start) -> str:
    plan, train = start.plan, start.plan.train
    config = read_config(train.hf_path)
    read_architecture(train.hf_path)
    parts = PARTS if train.with_vision else ("text",)
    found = _checked("actor_config.load" if start.save is None else str(start.save), train.load, config, parts)
    if plan.needs_reference and train.reference_load != train.load:
        _checked(plan.reference_key, train.reference_load, config)
    critic = "" if plan.critic is None else f"; critic: {_checked_critic(plan.critic.load, config).weights}"
    if plan.vision is not None:
        key = "vit_config.load" if plan.vision.load != train.load else "actor_config.load"
        critic += f"; vision encoder: {_checked(key, plan.vision.load, config, VISION_PARTS).weights}"
    kind = {
        "hf": "Hugging Face weights",
        "mm": "mm-convert weights",
        "ranks": "weights of several ranks",
        "training": f"training save of iteration {found.iteration}",
    }
    reference = f"; reference: {start.reference.path} ({start.reference.short})" if start.reference else ""
    return f"weights: {kind[found.kind]} in {found.weights}{reference}{critic}"


def _checked(key: str, folder: str, config: dict[str, Any], parts: tuple[Part, ...] = PARTS) -> WeightFolder:
    try:
        return check_weights(folder, config, parts)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _checked_critic(folder: str, config: dict[str, Any]) -> WeightFolder:
    try:
        return check_value_weights(folder, config)
    except ValueError as error:
        raise ValueError(f"critic_config.load: {error}") from error


def _rope(plan: Plan) -> None:
    if plan.preference:
        return
    import transformers

    read = transformers.AutoConfig.from_pretrained(plan.train.hf_path).get_text_config().to_dict()
    check_rope(plan.train.hf_path, read, f"transformers {transformers.__version__}")


def check_rope(folder: str, read: Mapping[str, Any], reader: str) -> None:
    """read: the text keys of config.json as `reader` gives them to the rollout engine; an older one passes over what a newer one wrote.

    Raises ValueError when trainer and rollout engine would turn by other angles.
    """
    own = read_architecture(folder).text
    # transformers 4 has rope_theta of its own, and carries rope_parameters along without a look at them.
    is_4 = "rope_theta" in read
    rope = (read.get("rope_scaling") or {}) | {"rope_theta": read["rope_theta"]} if is_4 else read["rope_parameters"]
    ours, theirs = (own.rope_theta, own.rope_scaling), (float(rope["rope_theta"]), read_rope_scaling(rope, read))
    if ours != theirs:
        raise ValueError(
            f"{folder}/config.json asks for rope_theta {ours[0]:g} and scaling {ours[1]}, but {reader}, by which the rollout engine reads "
            f"it, finds {theirs[0]:g} and {theirs[1]}: write rope_theta and rope_scaling beside rope_parameters, with the same values"
        )


def _space(plan: Plan) -> str:
    """A run that has no room for a single save would lose hours of work at its first one."""
    folder, needed, free = Path(plan.run.save), save_bytes(plan), free_bytes(Path(plan.run.save))
    if free < needed:
        raise ValueError(
            f"actor_config.save: {folder} has room for {size_text(free)} but one save takes about {size_text(needed)}; make room there, "
            "or name a folder elsewhere"
        )
    return f"saves: about {size_text(needed)} each, {size_text(free)} free in {folder}"


def _data(start: Start) -> str:
    plan = start.plan.data
    with closing(_opened(start.plan, plan)) as loader:
        if start.save is not None:
            loader.load_state(start.contents["data"])
        report = loader.scan()
        if start.plan.preference:
            return f"data: {_told(report, plan)}{_epochs(start.plan.run, report)}"
        return f"data: {_told(report, plan)}{_routes(start.plan, report, has_messages=bool(loader.rows[0].messages))}"


def _opened(plan: Plan, data: DataPlan) -> RowLoader:
    return PairLoader(data) if plan.preference else PromptLoader(data)


def _epochs(run: RunPlan, report: ScanReport) -> str:
    drawn = run.train_iters * run.prompts_per_generation
    return f"; {drawn} pairs to train on (train_iters x global_batch_size), {drawn / report.usable:.2f} epochs"


def _routes(plan: Plan, report: ScanReport, has_messages: bool) -> str:
    """How many rows go by which verifiers: a misspelt source would go by those of all others for ever."""
    routed = {source: ", ".join(names) for source, names, _ in plan.reward.by_source}
    if (missing := [source for source in routed if source not in report.sources]) and plan.eval is None:
        raise ValueError(
            f"rl_config.verifier_by_source: no row of {plan.data.train_path} is of data_source {missing[0]!r}; its sources are "
            f"{', '.join(f'{source!r} ({count} rows)' for source, count in report.sources.items())}"
        )
    if RewardSettings(**asdict(plan.reward)).asks_model and not has_messages:
        raise ValueError(
            f"rl_config.reward_model reads messages, but {plan.data.train_path} holds token ids alone; train on parquet or JSON rows"
        )
    rest = ", ".join(plan.reward.verifiers)
    lines = [f"{count} of {source or 'no data_source'} by {routed.get(source, rest)}" for source, count in report.sources.items()]
    return f"; rows: {'; '.join(lines)}" if routed else ""


def _eval_data(plan: Plan) -> Iterator[str]:
    return (_eval_file(data, plan) for data in eval_data(plan))


def _eval_file(plan: DataPlan, whole: Plan) -> str:
    key = "eval.held_out_rows" if whole.eval.held_out_rows else "eval.data_path"
    if Path(plan.train_path).is_dir() and not whole.eval.held_out_rows:
        raise ValueError(f"eval.data_path: {plan.train_path} is a folder; name a file in it, for example {plan.train_path}/test.parquet")
    try:
        with closing(_opened(whole, plan)) as loader:
            return f"evaluation: {Path(plan.train_path).name}: {_told(loader.scan(), plan)}"
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _told(report: ScanReport, plan: DataPlan) -> str:
    bound = f", seq_length {plan.max_pair_length}" if plan.max_pair_length else ""
    dropped = f", {report.too_long} too long (max_prompt_length {plan.max_prompt_length}{bound})" if report.too_long else ""
    rules = ", ".join(f"{count} {rule}" for rule, count in sorted(report.rules.items()))
    bad = f", {len(report.bad_rows)} bad (skip_bad_rows: {rules}), the first: {report.bad_rows[0]}" if report.bad_rows else ""
    answered = f", {report.longest} with its longer answer" if plan.max_pair_length else ""
    return f"{report.usable} of {report.rows} rows usable, longest prompt {report.longest_prompt} tokens{answered}{dropped}{bad}"
