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
from mindspeed_mm_rl.models.weight_files import recognise
from mindspeed_mm_rl.report import write_report
from mindspeed_mm_rl.rewards.pool import RewardPool
from mindspeed_mm_rl.rewards.scoring import RewardSettings
from mindspeed_mm_rl.sinks import open_metric_log
from mindspeed_mm_rl.trainer.collect import Collector
from mindspeed_mm_rl.trainer.rl import RLTrainer
from mindspeed_mm_rl.trainer.state import RunState
from mindspeed_mm_rl.workers import placement
from mindspeed_mm_rl.workers.group import ActorGroup, RolloutGroupStream

_console = Console(stderr=True)


def run(plan: Plan) -> None:
    """The whole training run. Raises ValueError or RuntimeError with one sentence when it cannot go on; nothing is left running."""
    with closing(PromptLoader(plan.data)) as loader, RewardPool(RewardSettings(**asdict(plan.reward))) as rewards:
        rewards.wait_ready()
        try:
            with _console.status("starting Ray, the trainer and the rollout engine"):
                actor, rollout = _start_workers(plan)
            _train(plan, actor, rollout, loader, rewards)
        finally:
            placement.stop()


def _start_workers(plan: Plan) -> tuple[ActorGroup, RolloutGroupStream]:
    slots = placement.start(plan.run)
    actor = ActorGroup(slots, plan, with_reference=plan.recipe.kl_coef != 0)
    rollout = RolloutGroupStream(slots, plan)
    parameters = actor.ready()
    rollout.ready()
    _console.print(f"{parameters:,} trainable parameters, {len(actor.workers)} trainer and {len(rollout.workers)} rollout process(es)")
    return actor, rollout


def _train(plan: Plan, actor: ActorGroup, rollout: RolloutGroupStream, loader: PromptLoader, rewards: RewardPool) -> None:
    settings = RecipeSettings(**asdict(plan.recipe))
    recipe, kl, state = make_recipe(settings), make_kl_controller(settings), RunState(plan)
    found = recognise(plan.train.load)
    if found.kind == "training":
        state.resume(found.weights.parent, actor, loader, kl)
        _console.print(f"continuing {found.weights.parent} after iteration {state.iteration}")
    collector = Collector(plan, recipe, loader, actor, rollout, rewards, loader.builder.renderer.tokenizer)
    output = Path(plan.run.output)
    with closing(open_metric_log(output, plan.run.train_iters, state.iteration, plan.run.use_tensorboard)) as log:
        RLTrainer(plan, recipe, read_architecture(plan.train.hf_path), actor, rollout, collector, kl, state, log).train()
    _console.print(write_report(output, plan.recipe.algorithm))
    _console.print(f"metrics, table and curves: {output}")
