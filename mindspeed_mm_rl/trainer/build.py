"""Builds everything that a run needs from its Plan, runs it, and takes it down again."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from mindspeed_mm_rl.algorithms.recipes import RecipeSettings, make_kl_controller, make_recipe
from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.data.loader import PromptLoader
from mindspeed_mm_rl.models.families import read_architecture
from mindspeed_mm_rl.platforms import signals
from mindspeed_mm_rl.report import report_evaluation, write_report
from mindspeed_mm_rl.rewards.pool import RewardPool
from mindspeed_mm_rl.rewards.scoring import RewardSettings
from mindspeed_mm_rl.sinks import open_metric_log
from mindspeed_mm_rl.trainer.collect import Collector
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
    with Ending() as ending, Guardian(plan.run.save) as guardian, closing(PromptLoader(plan.data)) as loader:
        try:
            with RewardPool(RewardSettings(**asdict(plan.reward))) as rewards, ending.said(state):
                rewards.wait_ready()
                with _console.status("starting Ray, the trainer and the rollout engine"):
                    trainers, rollout = _start_workers(plan, guardian)
                with signals.held():
                    _train(state, trainers, rollout, loader, rewards)
        finally:
            placement.stop()


def _start_workers(plan: Plan, guardian: Guardian) -> tuple[Trainers, RolloutGroupStream]:
    slots = placement.start(plan.run)
    if slots.is_own_cluster:
        guardian.tell(session=slots.session_folder)
    trainers = _new_trainers(slots, plan)
    rollout = RolloutGroupStream(slots, plan)
    parameters = {name: group.ready() for name, group in trainers.by_folder().items()}
    rollout.ready()
    rollout.while_waiting = trainers.check_alive
    told = ", ".join(f"{name} {count:,}" for name, count in parameters.items())
    _console.print(f"trainable parameters: {told}; {len(trainers.actor.workers)} trainer and {len(rollout.workers)} rollout process(es)")
    return trainers, rollout


def _new_trainers(slots: placement.Slots, plan: Plan) -> Trainers:
    with_reference, critic = plan.recipe.kl_coef != 0, CriticGroup(slots, plan) if plan.critic else None
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
    collector = Collector(plan, recipe, loader, GroupSampler(plan, trainers, rollout, rewards, loader.builder.renderer.tokenizer))
    output = Path(plan.run.output)
    with (
        open_evaluator(state, trainers, rollout) as evaluator,
        closing(open_metric_log(output, plan.run.train_iters, state.iteration, plan.run.use_tensorboard)) as log,
    ):
        RLTrainer(plan, recipe, read_architecture(plan.train.hf_path), trainers, rollout, collector, kl, state, log, evaluator).train()
    _console.print(write_report(output, plan.recipe.algorithm))
    if evaluated := report_evaluation(output, state.best.iteration if state.best else None):
        _console.print(evaluated)
    _console.print(f"metrics, table and curves: {output}")
