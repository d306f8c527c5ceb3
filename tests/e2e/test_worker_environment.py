"""Variables of rl_config.runtime_env_path reach every process that Ray starts for a run, and nobody else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.workers import placement
from mindspeed_mm_rl.workers.group import ActorGroup, CriticGroup
from mindspeed_mm_rl.workers.replicas import RolloutGroupStream
from mindspeed_mm_rl.workers.vision_group import VisionGroup
from tests.plans import whole_plan

WORDS = {"A_WORD_FOR_ALL": "5", "TOKENIZERS_PARALLELISM": "true", "VLLM_LOGGING_LEVEL": "INFO"}


@pytest.fixture
def plan(tiny_vl: Path, tmp_path: Path) -> Plan:
    plan = whole_plan(tiny_vl, tmp_path / "train.parquet", tmp_path)
    return replace(plan, critic=plan.train, vision=plan.train, runtime_env=tuple(sorted(WORDS.items())))


@pytest.fixture
def slots(plan: Plan) -> Iterator[placement.Slots]:
    yield placement.start(plan.run)
    placement.stop()


def variables(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def test_every_role_gets_the_variables_of_the_user(slots: placement.Slots, plan: Plan) -> None:
    import ray

    groups = {
        "actor": ActorGroup(slots, plan, with_reference=False),
        "critic": CriticGroup(slots, plan),
        "vision": VisionGroup(slots, plan),
        "rollout": RolloutGroupStream(slots, plan),
    }
    for role, group in groups.items():
        pid, _ = ray.get(group.workers[0].alive.remote(), timeout=200)
        assert variables(pid).items() >= WORDS.items(), role
    assert "A_WORD_FOR_ALL" not in os.environ
