"""Builds everything that a run needs from its Plan, runs it, and takes it down again."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from mindspeed_mm_rl.algorithms.kl import KLController
from mindspeed_mm_rl.algorithms.recipes import RecipeSettings, make_kl_controller, make_recipe
from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.data.loader import PromptLoader
from mindspeed_mm_rl.data.pairs import PairLoader
from mindspeed_mm_rl.models.families import read_architecture
from mindspeed_mm_rl.platforms import signals
from mindspeed_mm_rl.report import report_evaluation, write_report
from mindspeed_mm_rl.rewards.pool import RewardPool
from mindspeed_mm_rl.rewards.scoring import RewardSettings
from mindspeed_mm_rl.sinks import open_metric_log
from mindspeed_mm_rl.trainer.collect import Collector
from mindspeed_mm_rl.trainer.compare import Comparer
from mindspeed_mm_rl.trainer.dpo import PreferenceTrainer, open_pair_evaluator
from mindspeed_mm_rl.trainer.ending import Ending
from mindspeed_mm_rl.trainer.evaluate import open_evaluator
from mindspeed_mm_rl.trainer.guardian import Guardian
from mindspeed_mm_rl.trainer.resume import Start, start_of
from mindspeed_mm_rl.trainer.rl import RLTrainer
from mindspeed_mm_rl.trainer.sampler import GroupSampler
from mindspeed_mm_rl.trainer.save_folder import SaveFolder
from mindspeed_mm_rl.trainer.state import RunState
from mindspeed_mm_rl.workers import placement
from mindspeed_mm_rl.workers.group import ActorGroup, CriticGroup, Trainers
from mindspeed_mm_rl.workers.nodes import open_storage
from mindspeed_mm_rl.workers.replicas import RolloutGroupStream
from mindspeed_mm_rl.workers.vision_group import ActorBesideVision, TrainedVisionGroup, VisionGroup

_console = Console(stderr=True)


def run(plan: Plan) -> None:
    """The whole training run; nothing of it is left running.

    Raises, with one sentence, ValueError (the user's to mend), RunFailed (a worker is lost, no memory, no disk) or StoppedBySignal.
    """
    if not plan.run.save:
        _run(start_of(plan))
        return
    saves = SaveFolder(Path(plan.run.save))
    with saves.held():
        saves.mend()
        start = start_of(plan)
        if not start.is_finished:
            saves.begin_at(start.save, start.iteration)
        try:
            _run(start)
        finally:
            # The workers, which may have been writing, are gone.
            saves.mend()


def evaluate(plan: Plan) -> dict[str, float]:
    """plan: of trainer/evaluate.py, `without_training`. Returns metrics by name; raises as `run`."""
    state = RunState(Start(plan))
    with Ending() as ending, Guardian(plan.run.save) as guardian:
        try:
            with ending.said(state):
                if plan.preference:
                    comparer = Comparer(state, _start_trainers_alone(plan, guardian))
                    with signals.held(), open_pair_evaluator(state, comparer) as evaluator:
                        return evaluator.evaluate()
                with _console.status("starting Ray, the trainer and the rollout engine"):
                    trainers, rollout = _start_workers(plan, guardian)
                rollout.receive_weights(trainers.actor.publish_weights(), 0)
                with signals.held(), open_evaluator(state, trainers, rollout) as evaluator:
                    return evaluator.evaluate()
        finally:
            placement.stop()


def _run(start: Start) -> None:
    if start.is_finished:
        _console.print(start.finished_line)
        return
    plan = start.plan
    state = RunState(start, start.iteration)
    open_loader, train = (PairLoader, _run_on_pairs) if plan.preference else (PromptLoader, _run_on_prompts)
    with Ending() as ending, Guardian(plan.run.save) as guardian, closing(open_loader(plan.data)) as loader:
        try:
            train(state, ending, guardian, loader)
        finally:
            placement.stop()


def _run_on_prompts(state: RunState, ending: Ending, guardian: Guardian, loader: PromptLoader) -> None:
    plan = state.plan
    with RewardPool(RewardSettings(**asdict(plan.reward))) as rewards, ending.said(state):
        rewards.wait_ready()
        with _console.status("starting Ray, the trainer and the rollout engine"):
            trainers, rollout = _start_workers(plan, guardian)
        with signals.held():
            _train(state, trainers, rollout, loader, rewards)


def _run_on_pairs(state: RunState, ending: Ending, guardian: Guardian, loader: PairLoader) -> None:
    """Nothing is sampled or graded: there is neither a rollout engine nor a reward."""
    with ending.said(state):
        trainers = _start_trainers_alone(state.plan, guardian)
        with signals.held():
            _train_on_pairs(state, trainers, loader)


def _start_trainers_alone(plan: Plan, guardian: Guardian) -> Trainers:
    with _console.status("starting Ray and the trainer"):
        trainers = _new_trainers(_placed(plan, guardian), plan)
        _console.print(f"trainable parameters: {_ready(trainers)}; {len(trainers.actor.workers)} trainer process(es)")
    return trainers


def _placed(plan: Plan, guardian: Guardian) -> placement.Slots:
    slots = placement.start(plan.run)
    if slots.is_own_cluster:
        guardian.tell(session=slots.session_folder)
    return replace(slots, storage=open_storage(plan, slots))


def _ready(trainers: Trainers) -> str:
    """Waits; returns numbers of parameters, for people."""
    return ", ".join(f"{name} {group.ready():,}" for name, group in trainers.by_folder().items())


def _start_workers(plan: Plan, guardian: Guardian) -> tuple[Trainers, RolloutGroupStream]:
    slots = _placed(plan, guardian)
    trainers = _new_trainers(slots, plan)
    rollout = RolloutGroupStream(slots, plan)
    told = _ready(trainers)
    rollout.ready()
    rollout.while_waiting = trainers.check_alive
    _console.print(f"trainable parameters: {told}; {len(trainers.actor.workers)} trainer and {len(rollout.workers)} rollout process(es)")
    return trainers, rollout


def _new_trainers(slots: placement.Slots, plan: Plan) -> Trainers:
    with_reference, critic = plan.needs_reference, CriticGroup(slots, plan) if plan.critic else None
    if plan.vision is None:
        return Trainers(ActorGroup(slots, plan, with_reference), critic)
    if plan.rollout.image_embeds:
        return Trainers(ActorGroup(slots, plan, with_reference), critic, VisionGroup(slots, plan))
    vision = TrainedVisionGroup(slots, plan)
    return Trainers(ActorBesideVision(slots, plan, with_reference, vision), critic, vision)


def _train(state: RunState, trainers: Trainers, rollout: RolloutGroupStream, loader: PromptLoader, rewards: RewardPool) -> None:
    plan, settings = state.plan, RecipeSettings(**asdict(state.plan.recipe))
    recipe, kl = make_recipe(settings), make_kl_controller(settings)
    state.resume(trainers.by_folder(), loader, kl)
    trainers.storage.forget()
    collector = Collector(plan, recipe, loader, GroupSampler(plan, trainers, rollout, rewards, loader.builder.renderer.tokenizer))
    output = Path(plan.run.output)
    with (
        open_evaluator(state, trainers, rollout) as evaluator,
        closing(open_metric_log(output, plan.run.train_iters, state.iteration, plan.run.use_tensorboard)) as log,
    ):
        RLTrainer(plan, recipe, read_architecture(plan.train.hf_path), trainers, rollout, collector, kl, state, log, evaluator).train()
    _report(state)


def _train_on_pairs(state: RunState, trainers: Trainers, loader: PairLoader) -> None:
    plan = state.plan
    state.resume(trainers.by_folder(), loader, KLController(0.0))
    trainers.storage.forget()
    comparer = Comparer(state, trainers)
    with (
        open_pair_evaluator(state, comparer) as evaluator,
        closing(open_metric_log(Path(plan.run.output), plan.run.train_iters, state.iteration, plan.run.use_tensorboard)) as log,
    ):
        PreferenceTrainer(plan, trainers, loader, comparer, state, log, evaluator).train()
    _report(state)


def _report(state: RunState) -> None:
    output = Path(state.plan.run.output)
    _console.print(write_report(output, state.plan.recipe.algorithm))
    if evaluated := report_evaluation(output, state.best.iteration if state.best else None):
        _console.print(evaluated)
    _console.print(f"metrics, table and curves: {output}")
