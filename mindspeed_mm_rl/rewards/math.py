"""Is a mathematical answer right? Adapters of mathruler and math-verify.

mathruler and math-verify (sympy) are imported on first use: names and formats are known without them.
"""

from __future__ import annotations

import logging
from functools import lru_cache

from mindspeed_mm_rl.rewards.format import boxed_content, thinks_then_answers
from mindspeed_mm_rl.rewards.plain import settled

MAX_ANSWER_CHARACTERS = 300
"""Answers of known data sets that aren't equal as strings are shorter; symbolic graders take minutes over what a model may babble."""
_EVALUATED = ("**", "__", "lambda")
"""mathruler hands expressions to sympy's parse_expr, which evaluates Python: powers of powers and attribute tricks stay out."""
_CACHED = 1 << 15
"""Verdicts that a worker remembers: a policy gives the same answers again and again."""

# They tell at length about every answer that they cannot read, and about the time limit that is off.
for _name in ("math_verify", "pylatexenc"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def _gradable(given: str) -> bool:
    return 0 < len(given) <= MAX_ANSWER_CHARACTERS and not any(mark in given for mark in _EVALUATED)


@lru_cache(maxsize=_CACHED)
def equal_by_mathruler(given: str, answer: str) -> bool:
    """The rule of PRM800K: same string after normalisation, or sympy simplifies the difference to 0."""
    from mathruler.grader import grade_answer

    verdict = settled(given, answer)
    if verdict is not None or not _gradable(given):
        return bool(verdict)
    try:
        return bool(grade_answer(given, answer))
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError):
        # What the grader cannot read is a wrong answer, not a fault of the run; a broken grader shows in the workers' self-check.
        return False


@lru_cache(maxsize=_CACHED)
def parsed(latex: str) -> list[object]:
    """What math-verify reads in an answer. Half of its time goes here, and a group has one right answer and many equal guesses."""
    import math_verify

    # Its own time limit stays off: it is an alarm signal, which fails in any thread but the main one and then grades everything wrong.
    # The pool's deadline holds for all verifiers instead.
    return math_verify.parse(f"\\boxed{{{latex}}}", [math_verify.LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)


@lru_cache(maxsize=_CACHED)
def equal_by_math_verify(given: str, answer: str) -> bool:
    """Symbolic equality of two LaTeX answers by math-verify."""
    import math_verify

    verdict = settled(given, answer)
    if verdict is not None or not _gradable(given):
        return bool(verdict)
    return bool(math_verify.verify(parsed(answer), parsed(given), timeout_seconds=None))


def geo3k_acc_score(text: str, answer: str) -> float:
    """The boxed answer equals the right one by mathruler, else by math-verify."""
    given = boxed_content(text)
    return float(given is not None and (equal_by_mathruler(given, answer) or equal_by_math_verify(given, answer)))


def math_17k_acc_score(text: str, answer: str) -> float:
    given = boxed_content(text)
    return float(given is not None and equal_by_mathruler(given, answer))


def base_acc_score(text: str, answer: str) -> float:
    return math_17k_acc_score(text, answer) if thinks_then_answers(text) else 0.0


def math_verify_score(text: str, answer: str) -> float:
    given = boxed_content(text)
    return float(given is not None and thinks_then_answers(text) and equal_by_math_verify(given, answer))
