"""`profiler_config`: its section, the rules over it, and what the workers get of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from mindspeed_mm_rl.config.section import Section
from mindspeed_mm_rl.platforms.profiling import TraceSettings

Stage = Literal["actor_compute_log_prob", "reference_compute_log_prob", "actor_update"]
STAGES: tuple[Stage, ...] = ("actor_compute_log_prob", "reference_compute_log_prob", "actor_update")


class Integrated(Section):
    """Traces of the actor's processes."""

    profile: bool = False
    """true: the actor's ranks write traces, for ui.perfetto.dev or chrome://tracing."""
    stage: tuple[Stage, ...] = STAGES
    """What is traced: log-probs, those of the reference, updates; all, one of them or a list."""
    profile_save_path: str | None = None
    """Folder; null = profile in rl_config.output."""
    profile_step_start: int = Field(1, ge=1)
    """First call of each stage that is traced, counted from 1 in this start of the run; of an update, one mini-batch is a call."""
    profile_step_end: int = Field(2, ge=1)
    """First call that is traced no more."""
    profile_ranks: tuple[int, ...] | None = None
    """Ranks of the actor that write; null or all = all of them."""
    profile_with_cpu: bool = True
    """true: what the host does."""
    profile_with_npu: bool = True
    """true: what the device does."""
    profile_with_memory: bool = False
    """true: allocations."""
    profile_record_shapes: bool = False
    """true: shapes of the arguments."""
    profile_with_module: bool = False
    """true: names of modules."""

    @field_validator("stage", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return STAGES if value == "all" else (value,) if isinstance(value, str) else value

    @field_validator("profile_ranks", mode="before")
    @classmethod
    def _all_is_no_choice(cls, value: Any) -> Any:
        return None if value == "all" else value


class ProfilerConfig(Section):
    """`profiler_config`"""

    integrated: Integrated = Integrated()
    """The trainer's processes."""


def trace_settings(config: ProfilerConfig, output: str, num_ranks: int) -> TraceSettings | None:
    """None without profile. Raises ValueError for keys that choose nothing."""
    own = config.integrated
    if not own.profile:
        return None
    if own.profile_step_end <= own.profile_step_start:
        raise ValueError(
            f"profiler_config.integrated.profile_step_end ({own.profile_step_end}), the first call that isn't traced, must be > "
            f"profile_step_start ({own.profile_step_start})"
        )
    if not (own.profile_with_cpu or own.profile_with_npu):
        raise ValueError(
            "profiler_config.integrated.profile_with_cpu and profile_with_npu are both false, so that nothing is traced: set one to true"
        )
    ranks = range(num_ranks) if own.profile_ranks is None else own.profile_ranks
    unknown = [rank for rank in ranks if rank not in range(num_ranks)]
    if unknown or not ranks:
        raise ValueError(f"profiler_config.integrated.profile_ranks must be all or ranks of the actor, 0 to {num_ranks - 1}, not {unknown}")
    return TraceSettings(
        folder=str(Path(own.profile_save_path or Path(output, "profile")).expanduser().absolute()),
        stages=own.stage,
        first_call=own.profile_step_start,
        end_call=own.profile_step_end,
        ranks=own.profile_ranks,
        host=own.profile_with_cpu,
        device=own.profile_with_npu,
        memory=own.profile_with_memory,
        shapes=own.profile_record_shapes,
        modules=own.profile_with_module,
    )
