"""A user's own reward: `path/to/file.py:name` in rl_config.verifier_function, run in the grading processes alone.

Example of such a file:
    def brief(data_source, solution_str, ground_truth, extra_info):
        return {"score": float(ground_truth in solution_str), "acc": ground_truth in solution_str, "words": len(solution_str.split())}
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Any

_MARK = ".py:"
_ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")


@dataclass(frozen=True)
class Verdict:
    score: float
    is_right: bool
    """What the function says under `acc`; without it, whether the score is at least 1."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The other finite numbers that the function gave; what is no number is for nobody."""


def is_function(name: str) -> bool:
    """Is this entry of verifier_function a file and a function, not a name of the registry?"""
    return _MARK in name or name.endswith(_MARK[:-1])


def split(name: str) -> tuple[str, str]:
    """File and function; ValueError without one of them. Example: split("rewards/brief.py:brief") == ("rewards/brief.py", "brief")."""
    path, mark, function = name.rpartition(_MARK)
    if not mark or not function.isidentifier():
        raise ValueError(f"rl_config.verifier_function: {name!r} must be path/to/file.py:name, with the name of a function in that file")
    return f"{path}.py", function


def grade(name: str, data_source: str, text: str, answer: str, extra: dict[str, Any]) -> Verdict:
    """Calls the user's function. Raises whatever it raises, and ValueError when it returns anything but a number or a dict with one."""
    given = load(name)(data_source=data_source, solution_str=text, ground_truth=answer, extra_info=extra)
    values = given if isinstance(given, dict) else {"score": given}
    if "score" not in values:
        raise ValueError(f"{name} returned a dict without 'score', which is the reward: {given!r}")
    score = _number(name, "score", values["score"])
    is_right = _number(name, "acc", values["acc"]) >= 1.0 if "acc" in values else score >= 1.0
    others = {str(key): float(value) for key, value in values.items() if key != "score" and isinstance(value, Real)}
    return Verdict(score, is_right, {key: value for key, value in others.items() if math.isfinite(value)})


@lru_cache
def load(name: str) -> Callable[..., Any]:
    """Runs the file, once per process. Raises ValueError when it has no such function, or one of other arguments."""
    file, function = split(name)
    path = Path(file).resolve()
    if not path.is_file():
        raise ValueError(f"rl_config.verifier_function: {path} does not exist")
    # For what it imports from its own folder.
    sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"rl_config.verifier_function: {path} can't be imported ({type(error).__name__}: {error})") from error
    found = vars(module).get(function)
    if not callable(found):
        raise ValueError(f"rl_config.verifier_function: {path} has no function {function!r}")
    try:
        inspect.signature(found).bind(**dict.fromkeys(_ARGUMENTS))
    except TypeError as error:
        raise ValueError(f"rl_config.verifier_function: {path}:{function} must take ({', '.join(_ARGUMENTS)}), but {error}") from error
    return found


def _number(name: str, key: object, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} returned {value!r} as {key!r}, which is no number") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} returned {number} as {key!r}, which is not finite")
    return number
