"""The Plan as text, for the first lines of a run."""

from __future__ import annotations

import textwrap
from dataclasses import fields, is_dataclass
from typing import Any

from mindspeed_mm_rl.config.plan import Plan

_FILL = textwrap.TextWrapper(width=140, subsequent_indent=" " * 14, break_long_words=False, break_on_hyphens=False)


def render_plan(plan: Plan) -> str:
    """One paragraph per part, every value in it, then one line per note."""
    unused = ("rollout", "reward", "recipe") if plan.preference else ()
    names = [field.name for field in fields(plan) if field.name not in unused and is_dataclass(getattr(plan, field.name))]
    lines = [_part(name, getattr(plan, name)) for name in names]
    lines += [_wrap("environment", ", ".join(f"{name}={value}" for name, value in plan.runtime_env))] if plan.runtime_env else []
    lines += [_wrap("note", note) for note in plan.notes]
    return "\n".join(["Plan", *lines])


def _part(name: str, part: Any) -> str:
    return _wrap(name, ", ".join(_values(part)))


def _values(part: Any) -> list[str]:
    shown = []
    for field in fields(part):
        value = getattr(part, field.name)
        shown += _values(value) if is_dataclass(value) else [f"{field.name}={_text(value)}"]
    return shown


def _text(value: Any) -> str:
    return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, tuple) else str(value) if value != "" else "-"


def _wrap(name: str, text: str) -> str:
    return _FILL.fill(f"  {name:<11} {text}")
