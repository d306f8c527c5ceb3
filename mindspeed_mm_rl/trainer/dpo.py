"""Training on pairs of responses: the loop, its record, and accuracy on pairs that are not trained on.

loader --pairs--> Comparer (pictures, reference log-probs) --mini-batches--> actor.update --> record, evaluation, save
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import torch
from tqdm import tqdm

from mindspeed_mm_rl.algorithms.kl import KLController
from mindspeed_mm_rl.algorithms.preference import PreferenceSettings, loss_of, preference_loss
from mindspeed_mm_rl.config.plan import EvalPlan, Plan
from mindspeed_mm_rl.data.pairs import Pair, PairLoader
from mindspeed_mm_rl.metrics import Metric, Stopwatch, TokenCounts, iteration_record, reduce
from mindspeed_mm_rl.sinks import MetricLog
from mindspeed_mm_rl.trainer.batch import mini_batches
from mindspeed_mm_rl.trainer.compare import Compared, Comparer
from mindspeed_mm_rl.trainer.evaluate import Evaluator, eval_data, file_labels
from mindspeed_mm_rl.trainer.record import Update
from mindspeed_mm_rl.trainer.state import RunState
from mindspeed_mm_rl.types import Batch, LossInput
from mindspeed_mm_rl.workers.group import Trainers

ACCURACY = "rewards/accuracies"
_OF_UPDATE = {"grad_norm": "actor/grad_norm", "lr": "actor/lr"}
"""What an update calls it -> metric name; the loss's own metrics keep their names."""
_NOT_LOGGED = ("logprob_gap_mean", "logprob_gap_max")
_HELD_OUT = "held_out"


@dataclass
class PreferenceTrainer:
    """Everything is built already (trainer/build.py); `train` only turns the wheel."""

    plan: Plan
    trainers: Trainers
    loader: PairLoader
    comparer: Comparer
    state: RunState
    log: MetricLog
    evaluator: PairEvaluator

    def train(self) -> None:
        run = self.plan.run
        if self.state.iteration == 0 and (before := self.evaluator.after(0)):
            self.log.record(0, before)
        for step in range(self.state.iteration + 1, run.train_iters + 1):
            self.log.record(step, self.iteration(step) | self.evaluator.after(step))
            self.state.iteration = step
            if run.saves_after(step):
                # First: what is saved was trained with them, and a run that goes on there must find the same ones.
                self.comparer.flush()
                self.state.save(self.trainers.by_folder(), self.loader, KLController(0.0))
        self.comparer.flush()

    def iteration(self, step: int) -> dict[str, float]:
        """Draws pairs, compares, updates once per mini-batch; returns what is logged."""
        clock, updates = Stopwatch(), []
        with clock.measure("all"):
            with clock.measure("data"):
                pairs = self.loader.next_pairs(self.plan.run.prompts_per_generation)
            compared = self.comparer.compared(pairs, clock)
            minis = list(mini_batches(compared.batch, self.plan.run, step))
            with clock.measure("update"):
                for mini in tqdm(minis, desc="update", unit="mini-batch", disable=None, leave=False):
                    loss = loss_of(mini, self.comparer.settings)
                    updates.append((len(mini), self.trainers.actor.update(mini, compared.images, loss)))
        return self._record(compared, updates, clock)

    def _record(self, compared: Compared, updates: list[Update], clock: Stopwatch) -> dict[str, float]:
        num_pairs, counts = len(compared.batch) // 2, self.loader.counts
        values = of_updates(updates) | {f"data/{name}": float(count) for name, count in counts.items()}
        values |= {
            "train/epoch": counts["rows"] / len(self.loader.rows),
            "train/num_pairs": float(num_pairs),
            "train/num_updates": float(len(updates)),
            "reference/computed_pairs": float(compared.num_referred),
            "vision/images": float(compared.num_pictures),
            "vision/images_encoded": float(compared.num_encoded),
            "samples_per_second": num_pairs / clock.seconds("all"),
        }
        tokens = TokenCounts(
            prompt_lengths=compared.batch.prompts.lengths,
            response_lengths=compared.batch.responses.lengths,
            generated_samples=len(compared.batch),
            trained_samples=len(compared.batch) * self.plan.run.epochs,
            num_devices=self.plan.run.num_devices,
            use_max_lengths=self.plan.run.log_max_throughput,
        )
        return iteration_record(self.plan.recipe.algorithm, values, clock, tokens) | self.trainers.take_metrics()


def of_updates(updates: list[Update]) -> dict[str, float]:
    """Means over the iteration's updates by pairs; of the learning rate the last one."""
    named = [(n, {_OF_UPDATE.get(key, key): value for key, value in found.items() if key not in _NOT_LOGGED}) for n, found in updates]
    return reduce({key: Metric(value, "mean", n) for key, value in found.items()} for n, found in named) | {
        "actor/lr": updates[-1][1]["lr"]
    }


@contextmanager
def open_pair_evaluator(state: RunState, comparer: Comparer) -> Iterator[PairEvaluator]:
    """With its data opened; for a run without `eval` there is nothing to open."""
    with ExitStack() as opened:
        yield PairEvaluator(state, [opened.enter_context(closing(PairLoader(data))) for data in eval_data(state.plan)], comparer)


class PairEvaluator(Evaluator):
    """Loss, accuracy and margin of pairs that are not trained on, under the weights of the moment."""

    def __init__(self, state: RunState, loaders: list[PairLoader], comparer: Comparer) -> None:
        super().__init__(state, loaders, None)
        self.comparer = comparer

    def _decides(self, values: dict[str, float]) -> str:
        overall = f"eval/{ACCURACY}"
        return overall if overall in values else next(name for name in values if name.endswith(ACCURACY))

    def evaluate(self) -> dict[str, float]:
        plan, clock = self.state.plan.eval, Stopwatch()
        labels = [_HELD_OUT] if plan.held_out_rows else file_labels(plan.data)
        with clock.measure("eval"):
            found = [self._of_file(plan, loader) for loader in self.loaders]
        values = {f"eval/{label}/{name}": value for label, of in zip(labels, found, strict=True) for name, value in of.items()}
        if len(found) > 1:
            values |= {f"eval/{name}": sum(of[name] for of in found) / len(found) for name in found[0] if name != "num_pairs"}
        return values | {"timing/eval": clock.seconds("eval")}

    def _of_file(self, plan: EvalPlan, loader: PairLoader) -> dict[str, float]:
        """Raises ValueError when the file has no usable pair."""
        batches = [self._with_logprobs(pairs) for pairs in self._pairs(plan, loader)]
        loader.rewind()
        if not batches:
            raise ValueError(f"eval.data_path: no pair of {loader.rows.files[0]} can be used")
        return measured(batches, self.comparer.settings) | {"num_pairs": float(sum(map(len, batches)) // 2)}

    def _pairs(self, plan: EvalPlan, loader: PairLoader) -> Iterator[list[Pair]]:
        """As many at a time as training draws, for which there is memory."""
        left = plan.max_rows or len(loader.rows)
        while left and (pairs := loader.next_pairs(min(self.state.plan.run.prompts_per_generation, left), until=len(loader.rows))):
            left -= len(pairs)
            yield pairs

    def _with_logprobs(self, pairs: list[Pair]) -> Batch:
        """The policy's log-probs as `old_logprobs`."""
        compared = self.comparer.compared(pairs, Stopwatch())
        logprobs = self.comparer.trainers.actor.logprobs(compared.batch, compared.images)
        return compared.batch.with_column("old_logprobs", logprobs)


def measured(batches: list[Batch], settings: PreferenceSettings) -> dict[str, float]:
    """The loss and its metrics over all pairs of batches that hold the policy's log-probs as `old_logprobs`."""
    lengths = [length for batch in batches for length in batch.responses.lengths]
    policy = torch.cat([batch.old_logprobs.values for batch in batches])
    references = [batch.ref_logprobs.values for batch in batches if batch.ref_logprobs is not None]
    inputs = LossInput(
        logprobs=policy,
        entropy=policy,
        old_logprobs=policy,
        rollout_logprobs=policy,
        ref_logprobs=torch.cat(references) if references else None,
        advantages=policy,
        loss_mask=torch.cat([batch.loss_mask.values for batch in batches]),
        sequence_index=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        num_loss_tokens=float(sum(lengths)),
        num_sequences=float(len(lengths)),
    )
    _, metrics = preference_loss(inputs, settings, float(sum(lengths[::2])))
    return {name: float(value) for name, value in metrics.items()}
