"""Verifiers by the names that users write in rl_config.verifier_function: rules of this registry, functions of theirs, a reward model.

One registry for text and pictures. `acc` and `format` are those of the text data sets; what geometry3k's instruction asks for is
`geo3k`, made of `geo3k_acc` and `geo3k_format`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mindspeed_mm_rl.rewards import custom
from mindspeed_mm_rl.rewards.format import format_score, geo3k_format_score, step_score, strict_format_score
from mindspeed_mm_rl.rewards.geo3k import geo3k_score
from mindspeed_mm_rl.rewards.math import base_acc_score, geo3k_acc_score, math_17k_acc_score, math_verify_score
from mindspeed_mm_rl.rewards.matheval import acc_score
from mindspeed_mm_rl.rewards.minerva import acc_for_dapo_score, retool_score

REWARD_MODEL = "reward_model"
"""The name under which rl_config.reward_model scores."""
FALLBACK_JUDGE = "math_17k_acc"
"""Says right or wrong where no verifier of the run does: is the answer in the box right?"""


@dataclass(frozen=True)
class Verifier:
    """A rule that scores one response.

    Example: Verifier("geo3k_acc", geo3k_acc_score, right=1.0, killed=0.0, measures_accuracy=True, examples=((text, answer),))
    """

    name: str
    score: Callable[[str, str], float]
    """(response text, right answer) -> score. The text is decoded without special tokens."""
    right: float
    """Highest score, and that of every example."""
    killed: float
    """Score of a response whose grading hung, raised or crashed: the lowest, but 0 for acc and strict_format, as their users know it."""
    measures_accuracy: bool
    """True: a response is right iff its score is `right`."""
    examples: tuple[tuple[str, str], ...]
    """Graded when a worker starts: a grader that is silently broken must not grade a run."""
    parts: tuple[str, ...] = ()
    """Verifiers that this one is made of, logged beside it."""


_TAGGED = "<think>2 + 3 = 5</think><answer>\\boxed{5}</answer>"
_SAME_ROOT = ("<think>a</think> \\boxed{\\sqrt{8}}", "2\\sqrt{2}")
# Not reduced: mathruler refuses it, math-verify accepts it, so this example needs both.
_SAME_RATIO = ("<think>b</think> \\boxed{\\frac{10}{4}}", "\\frac{5}{2}")

_ALL = (
    Verifier("geo3k", geo3k_score, 1.0, 0.0, False, (_SAME_ROOT, _SAME_RATIO), ("geo3k_acc", "geo3k_format")),
    Verifier("geo3k_acc", geo3k_acc_score, 1.0, 0.0, True, (_SAME_ROOT, _SAME_RATIO)),
    Verifier("geo3k_format", geo3k_format_score, 1.0, 0.0, False, (_SAME_ROOT,)),
    Verifier("acc", acc_score, 1.0, 0.0, True, (_SAME_ROOT, _SAME_RATIO)),
    Verifier("base_acc", base_acc_score, 1.0, 0.0, True, ((_TAGGED, "5"),)),
    Verifier("math_17k_acc", math_17k_acc_score, 1.0, 0.0, True, (_SAME_ROOT,)),
    Verifier("acc_for_ppo", math_17k_acc_score, 1.0, 0.0, True, (_SAME_ROOT,)),
    Verifier("acc_for_dapo", acc_for_dapo_score, 1.0, -1.0, True, (("so\nAnswer: $1,000$", "1000"),)),
    Verifier("math_verify_reward", math_verify_score, 1.0, 0.0, True, ((_TAGGED, "5"), (_TAGGED, "\\frac{10}{2}"))),
    Verifier("retool_reward", retool_score, 1.0, -1.0, True, (("so \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),)),
    Verifier("format", format_score, 1.0, 0.0, False, ((_TAGGED, "5"),)),
    Verifier("strict_format", strict_format_score, 1.0, 0.0, False, ((_TAGGED, "5"),)),
    Verifier("step", step_score, 1.0, 0.0, False, (("Step 1: First, add.\n- 2", "2"),)),
)
VERIFIERS: dict[str, Verifier] = {verifier.name: verifier for verifier in _ALL}


def find_verifier(name: str) -> Verifier:
    """A rule of the registry. Raises ValueError with the nearest valid name."""
    if name not in VERIFIERS:
        known = (*VERIFIERS, REWARD_MODEL)
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"rl_config.verifier_function names {name!r}, which does not exist; did you mean {nearest!r}? Verifiers: {', '.join(known)}, "
            "or path/to/file.py:name"
        )
    return VERIFIERS[name]


def label(name: str) -> str:
    """What a verifier is called in scores and metrics. Example: label("rewards/brief.py:brief") == "brief"."""
    return custom.split(name)[1] if custom.is_function(name) else name if name == REWARD_MODEL else find_verifier(name).name


def check_verifiers(names: Iterable[str]) -> None:
    """For a check before training: raises ValueError on the first unknown name, and when two would be called the same in the metrics."""
    called: dict[str, str] = {}
    for name in names:
        if called.setdefault(label(name), name) != name or (custom.is_function(name) and label(name) in (*VERIFIERS, REWARD_MODEL)):
            raise ValueError(
                f"rl_config.verifier_function: {name} is called {label(name)} in the metrics, as {called[label(name)]} or a verifier of "
                "the registry is; rename the function"
            )


def score_names(names: Iterable[str]) -> tuple[str, ...]:
    """Labels of every score that these verifiers produce, parts included.

    Example: score_names(["geo3k", "brief.py:brief"]) == ("geo3k", "geo3k_acc", "geo3k_format", "brief").
    """
    labels = [part for name in names for part in (label(name), *(VERIFIERS[name].parts if name in VERIFIERS else ()))]
    return tuple(dict.fromkeys(labels))


def killed_scores(names: Iterable[str]) -> dict[str, float]:
    """What a response gets whose grading was killed; of a user's function 0. The reward model's score is no part of it."""
    return {name: VERIFIERS[name].killed if name in VERIFIERS else 0.0 for name in score_names(names) if name != REWARD_MODEL}


def judge_name(names: Iterable[str]) -> str:
    """Which of the verifiers says right or wrong: the first rule that measures it, else the first function, else the fallback."""
    rule = next((name for name in score_names(names) if name in VERIFIERS and VERIFIERS[name].measures_accuracy), None)
    return rule or next(filter(custom.is_function, names), FALLBACK_JUDGE)
