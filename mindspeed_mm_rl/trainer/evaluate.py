"""Accuracy on rows that are not trained on, beside training and without a trace in it.

rows of eval.data_path, in file order --> sampler (seeds of a stream of its own) --> graders of its own --> eval/<data set>/...

The position in the training data, random states, the training samples' seeds and the patience of training's graders stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from mindspeed_mm_rl.algorithms.pass_at_k import accuracies
from mindspeed_mm_rl.config.plan import DataPlan, EvalPlan, Plan
from mindspeed_mm_rl.data.loader import PromptLoader
from mindspeed_mm_rl.metrics import Stopwatch
from mindspeed_mm_rl.rewards.pool import RewardPool
from mindspeed_mm_rl.rewards.scoring import RewardSettings
from mindspeed_mm_rl.trainer.best import Best
from mindspeed_mm_rl.trainer.sampler import GroupSampler
from mindspeed_mm_rl.trainer.state import RunState
from mindspeed_mm_rl.types import Group, Prompt, Sampling
from mindspeed_mm_rl.workers.group import Trainers
from mindspeed_mm_rl.workers.replicas import RolloutGroupStream

_STREAM = "evaluation"


def without_training(plan: Plan) -> Plan:
    """The weights of actor_config.load as they are: nothing is trained, continued or saved.

    Raises ValueError where they would be compared with themselves.
    """
    if plan.preference and plan.needs_reference and plan.train.reference_load == plan.train.load:
        raise ValueError(
            f"megatron_training.ref_model is missing: {plan.preference.loss_type} compares actor_config.load ({plan.train.load}) with a "
            "reference; give the weights that training began with"
        )
    run = replace(plan.run, train_iters=0, save="", resume="off")
    return replace(plan, run=run, train=replace(plan.train, finetune=True), recipe=replace(plan.recipe, kl_coef=0.0), critic=None)


def eval_data(plan: Plan) -> list[DataPlan]:
    """How each file is read: as training reads its own, in file order."""
    if plan.eval is None:
        return []
    rows = (-plan.eval.held_out_rows, None) if plan.eval.held_out_rows else (None, None)
    return [replace(plan.data, train_path=path, shuffle=False, row_slice=rows) for path in plan.eval.data]


def file_labels(paths: tuple[str, ...]) -> list[str]:
    """Names without folder and ending. Example: file_labels(("a/test.parquet", "b/test.jsonl", "c")) == ["test_1", "test_2", "c"]."""
    stems = [Path(path).stem if Path(path).exists() else Path(path).name for path in paths]
    return [f"{stem}_{number}" if stems.count(stem) > 1 else stem for number, stem in enumerate(stems, 1)]


@dataclass
class Tally:
    """What is left of the groups of one data set."""

    num_right: list[int] = field(default_factory=list)
    """Of each prompt's samples."""
    lengths: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    def add(self, group: Group) -> None:
        self.num_right.append(sum(value >= 1.0 for value in group.accuracy))
        self.lengths += [len(rollout.token_ids) for rollout in group.rollouts]
        self.rewards += group.rewards

    def metrics(self) -> dict[str, float]:
        return accuracies(self.num_right, len(self.lengths) // len(self.num_right)) | {
            "reward/mean": sum(self.rewards) / len(self.rewards),
            "response_length/mean": sum(self.lengths) / len(self.lengths),
            "num_prompts": float(len(self.num_right)),
        }


def named(tallies: dict[tuple[str, str], Tally]) -> dict[str, float]:
    """tallies: by (data_source or empty, label of the file). A data set is its data_source, else its file; both where two have one name.

    Several data sets also have their mean, under eval/<metric>.
    """
    short = [source or file for source, file in tallies]
    names = [f"{source}/{file}" if source and short.count(source) > 1 else source or file for source, file in tallies]
    results = [tally.metrics() for tally in tallies.values()]
    values = {f"eval/{name}/{metric}": value for name, result in zip(names, results, strict=True) for metric, value in result.items()}
    if len(results) > 1:
        values |= {f"eval/{metric}": sum(r[metric] for r in results) / len(results) for metric in results[0] if "@" in metric}
    return values


def deciding_metric(values: dict[str, float], num_samples: int) -> str:
    """mean@n decides which save is the best: that of the only data set, or the mean of all."""
    overall = f"eval/mean@{num_samples}"
    return overall if overall in values else next(name for name in values if name.endswith(f"/mean@{num_samples}"))


@contextmanager
def open_evaluator(state: RunState, trainers: Trainers, rollout: RolloutGroupStream) -> Iterator[Evaluator]:
    """With data and graders opened; for a run without `eval` there is nothing to open."""
    plan = state.plan
    if plan.eval is None:
        yield Evaluator(state, [], None)
        return
    with ExitStack() as opened:
        loaders = [opened.enter_context(closing(PromptLoader(data))) for data in eval_data(plan)]
        rewards = opened.enter_context(RewardPool(RewardSettings(**asdict(plan.eval.reward))))
        rewards.wait_ready()
        yield Evaluator(state, loaders, GroupSampler(plan, trainers, rollout, rewards, loaders[0].builder.renderer.tokenizer))


class Evaluator:
    """Its verbs raise what training's sampling raises: a lost or silent worker ends the run in one sentence."""

    def __init__(self, state: RunState, loaders: list[PromptLoader], sampler: GroupSampler | None) -> None:
        self.state, self.loaders, self.sampler = state, loaders, sampler

    def is_due(self, iteration: int) -> bool:
        """iteration: the last one that is finished, 0 before the first."""
        plan, run = self.state.plan.eval, self.state.plan.run
        if plan is None:
            return False
        return plan.at_start if iteration == 0 else iteration % plan.interval == 0 or iteration == run.train_iters

    def after(self, iteration: int) -> dict[str, float]:
        """Evaluates the weights that the rollout engine has, and remembers the iteration when its save is the best so far.

        Empty where no evaluation is due.
        """
        if not self.is_due(iteration):
            return {}
        values, plan = self.evaluate(), self.state.plan
        if plan.run.saves_after(iteration):
            metric = self._decides(values)
            now = Best(iteration, metric, values[metric])
            self.state.best = self.state.best.or_better(now) if self.state.best else now
        return values

    def _decides(self, values: dict[str, float]) -> str:
        """The metric by which a save is the best."""
        return deciding_metric(values, self.state.plan.eval.samples_per_prompt)

    def evaluate(self) -> dict[str, float]:
        """Metric names as they are logged. Raises ValueError when a file has no usable row."""
        plan, clock = self.state.plan.eval, Stopwatch()
        sampling = Sampling(plan.samples_per_prompt, plan.temperature, _STREAM, with_logprobs=False)
        tallies: dict[tuple[str, str], Tally] = {}
        timeouts = crashes = 0
        with clock.measure("eval"):
            for file, prompts in self._batches(plan):
                graded = self.sampler.sample(prompts, self.sampler.new_pictures(), Stopwatch(), sampling)
                timeouts, crashes = timeouts + graded.timeouts, crashes + graded.crashes
                for group in graded.groups:
                    tallies.setdefault((group.prompt.data_source, file), Tally()).add(group)
        faults = {"eval/timeouts": float(timeouts), "eval/crashes": float(crashes)}
        return named(tallies) | faults | {"timing/eval": clock.seconds("eval")}

    def _batches(self, plan: EvalPlan) -> Iterator[tuple[str, list[Prompt]]]:
        """The label of a file and some of its prompts: as many at a time as training draws, for which there is memory."""
        first_id, size = 0, self.state.plan.run.prompts_per_generation
        for label, loader in zip(file_labels(plan.data), self.loaders, strict=True):
            rows, left = len(loader.rows), plan.max_rows or len(loader.rows)
            while left and (prompts := loader.next_prompts(min(size, left), until=rows)):
                left -= len(prompts)
                # Numbered through all files, so that no two samples share a seed.
                yield label, [replace(prompt, prompt_id=first_id + prompt.prompt_id) for prompt in prompts]
            if not loader.counts["prompts"]:
                raise ValueError(f"eval.data_path: no row of {loader.rows.files[0]} can be used")
            loader.rewind()
            first_id += rows
