"""Traces: which calls write one, what is in it, and the keys that choose."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from mindspeed_mm_rl.config.profiler import STAGES, Integrated, ProfilerConfig, trace_settings
from mindspeed_mm_rl.platforms.profiling import Tracer, TraceSettings


def work(tracer: Tracer, stage: str, calls: int) -> None:
    for _ in range(calls):
        with tracer.stage(stage):
            torch.ones(8, 8) @ torch.ones(8, 8)


def test_chosen_calls_of_chosen_stages_and_ranks_are_traced(tmp_path: Path):
    settings = TraceSettings(str(tmp_path / "profile"), ("actor_update",), 2, 4, (1,), shapes=True)
    for rank in (0, 1):
        tracer = Tracer(settings, rank)
        work(tracer, "actor_update", 4)
        work(tracer, "actor_compute_log_prob", 3)
    files = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert files == ["actor_update_2_rank1.json", "actor_update_3_rank1.json"]
    events = json.loads((tmp_path / "profile" / files[0]).read_text())["traceEvents"]
    (product,) = (event for event in events if event.get("name") == "aten::mm")
    assert product["args"]["Input Dims"][:2] == [[8, 8], [8, 8]]


def test_without_settings_nothing_is_written_and_errors_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    tracer = Tracer(None, 0)
    with pytest.raises(ValueError, match="as it was"), tracer.stage("actor_update"):
        raise ValueError("as it was")
    assert not list(tmp_path.iterdir())


def settings_of(ranks: int = 4, **keys: object) -> TraceSettings | None:
    return trace_settings(ProfilerConfig(integrated=Integrated.model_validate({"profile": True, **keys})), "/output", ranks)


def test_keys_choose():
    assert trace_settings(ProfilerConfig(), "/output", 4) is None
    every = settings_of()
    assert every == TraceSettings("/output/profile", STAGES, 1, 2)
    assert settings_of(stage="all", profile_ranks="all") == every
    # A save says what its run was asked for.
    json.dumps(asdict(every))
    some = settings_of(stage="actor_update", profile_ranks=[2], profile_step_start=3, profile_step_end=5, profile_save_path="/a")
    assert some == TraceSettings("/a", ("actor_update",), 3, 5, (2,))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"profile_step_start": 2}, r"profile_step_end \(2\).*must be > profile_step_start \(2\)"),
        ({"profile_ranks": [1, 7]}, r"profile_ranks must be all or ranks of the actor, 0 to 3, not \[7\]"),
        ({"profile_with_cpu": False, "profile_with_npu": False}, "profile_with_cpu and profile_with_npu are both false"),
    ],
)
def test_what_would_choose_nothing_is_refused(keys: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        settings_of(**keys)
