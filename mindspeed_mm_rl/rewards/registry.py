"""Verifiers by the names that users write in rl_config.verifier_function."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mindspeed_mm_rl.rewards.format import format_score, strict_format_score
from mindspeed_mm_rl.rewards.geo3k import geo3k_score
from mindspeed_mm_rl.rewards.math import acc_for_dapo_score, acc_score, base_acc_score, math_17k_acc_score, math_verify_score


@dataclass(frozen=True)
class Verifier:
    """A rule that scores one response.

    Example: Verifier("format", format_score, right=1.0, wrong=0.0, measures_accuracy=False, examples=((text, answer),))
    """

    name: str
    score: Callable[[str, str], float]
    """(response text, right answer) -> score. The text is decoded without special tokens."""
    right: float
    """Highest score, and that of every example."""
    wrong: float
    """Lowest score, and that of a response whose grading was killed."""
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
    Verifier("geo3k", geo3k_score, 1.0, 0.0, False, (_SAME_ROOT, _SAME_RATIO), ("acc", "format")),
    Verifier("acc", acc_score, 1.0, 0.0, True, (_SAME_ROOT, _SAME_RATIO)),
    Verifier("format", format_score, 1.0, 0.0, False, (_SAME_ROOT,)),
    Verifier("strict_format", strict_format_score, 1.0, -0.5, False, ((_TAGGED, "5"),)),
    Verifier("base_acc", base_acc_score, 1.0, 0.0, True, ((_TAGGED, "5"),)),
    Verifier("math_17k_acc", math_17k_acc_score, 1.0, 0.0, True, (_SAME_ROOT,)),
    Verifier("math_verify_reward", math_verify_score, 1.0, 0.0, True, ((_TAGGED, "5"), (_TAGGED, "\\frac{10}{2}"))),
    Verifier("acc_for_dapo", acc_for_dapo_score, 1.0, -1.0, True, (("so\nAnswer: $1,000$", "1000"),)),
)
VERIFIERS: dict[str, Verifier] = {verifier.name: verifier for verifier in _ALL}


def find_verifier(name: str) -> Verifier:
    """Raises ValueError with the nearest valid name."""
    if name not in VERIFIERS:
        nearest = difflib.get_close_matches(name, VERIFIERS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"rl_config.verifier_function names {name!r}, which does not exist; did you mean {nearest!r}? Verifiers: {', '.join(VERIFIERS)}"
        )
    return VERIFIERS[name]


def check_verifiers(names: Iterable[str]) -> None:
    """For a check before training: raises ValueError on the first unknown name."""
    for name in names:
        find_verifier(name)


def score_names(names: Iterable[str]) -> tuple[str, ...]:
    """Every score that these verifiers produce, parts included. Example: score_names(["geo3k"]) == ("geo3k", "acc", "format")."""
    return tuple(dict.fromkeys(part for name in names for part in (name, *find_verifier(name).parts)))


def accuracy_name(names: Iterable[str]) -> str:
    """The verifier that says right or wrong: the first one that measures it, `acc` when none of them does."""
    return next((name for name in score_names(names) if VERIFIERS[name].measures_accuracy), "acc")
