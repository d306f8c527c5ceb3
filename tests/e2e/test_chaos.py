"""Short form of the chaos test; `bash scripts/test.sh chaos` is the long one.

A run loses its trainer, is resumed, loses its driver in the middle of a save, is resumed, loses a rollout replica and a reward process,
and ends with the weights of a run that lost nothing.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.chaos.moments import ACTOR, DRIVER, PHASES, REWARD, ROLLOUT, Kill, strike
from tests.chaos.run import TrainRun
from tests.chaos.scene import make_scene, write_config
from tests.chaos.verdict import Reference, Verdict, check_end, check_left, check_result, check_save, make_reference

SETTING = "grpo"
PHASE = {phase.name: phase for phase in PHASES}
KILLS = (
    (Kill(SETTING, ACTOR, PHASE["update"], 2),),
    (Kill(SETTING, DRIVER, PHASE["save: before the tracker"], 2),),
    (Kill(SETTING, ROLLOUT, PHASE["collect"], 2), Kill(SETTING, REWARD, PHASE["rewards"], 3)),
)
"""Those of each run, one run continuing the other."""


def killed_run(config: Path, kills: tuple[Kill, ...]) -> Verdict:
    """The verdict on the last kill of one run; the others must have been survived."""
    with TrainRun(config) as run:
        for kill in kills:
            verdict = Verdict(kill)
            verdict.hit = strike(run, kill, 0.0, random.Random(0))
            assert verdict.hit is not None, f"{kill} did not come about: {run.console.tail()}"
        check_end(verdict, run)
        check_left(verdict, run)
    return verdict


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    scene = make_scene(tmp_path / "scene")
    config = write_config(scene, SETTING, tmp_path / "killed", keep_last=1)
    with ThreadPoolExecutor() as pool:
        undisturbed = pool.submit(make_reference, scene, SETTING, tmp_path / "undisturbed")
        verdicts = [killed_run(config, kills) for kills in KILLS]
        reference: Reference = undisturbed.result()
    check_save(verdicts[-1], config.parent, reference)
    check_result(verdicts[-1], config.parent, reference)
    assert [verdict.faults for verdict in verdicts] == [[], [], []]
    assert [verdict.exit_code for verdict in verdicts] == [verdicts[0].exit_code, -9, 0] and verdicts[0].exit_code > 0
