"""Is a mathematical answer right? Adapters of mathruler and math-verify, and the exact match of DAPO.

mathruler and math-verify (sympy) are imported on first use: names and formats are known without them.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache

from mindspeed_mm_rl.rewards.format import boxed_content, thinks_then_answers

_MAX_ANSWER_CHARACTERS = 300
"""No answer of a known data set is longer; symbolic graders take minutes over what a model may babble into a box."""
_EVALUATED = ("**", "__", "lambda")
"""mathruler hands expressions to sympy's parse_expr, which evaluates Python: powers of powers and attribute tricks stay out."""
_CACHED = 1 << 15
"""Verdicts that a worker remembers: a policy gives the same answers again and again."""

# They tell at length about every answer that they cannot read, and about the time limit that is off.
for _name in ("math_verify", "pylatexenc"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def _gradable(given: str) -> bool:
    return 0 < len(given) <= _MAX_ANSWER_CHARACTERS and not any(mark in given for mark in _EVALUATED)


@lru_cache(maxsize=_CACHED)
def equal_by_mathruler(given: str, answer: str) -> bool:
    """The rule of PRM800K: same string after normalisation, or sympy simplifies the difference to 0."""
    from mathruler.grader import grade_answer

    if not _gradable(given):
        return False
    try:
        return bool(grade_answer(given, answer))
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError):
        # What the grader cannot read is a wrong answer, not a fault of the run; a broken grader shows in the workers' self-check.
        return False


@lru_cache(maxsize=_CACHED)
def _parsed(latex: str) -> list[object]:
    """What math-verify reads in an answer. Half of its time goes here, and a group has one right answer and many equal guesses."""
    import math_verify

    # Its own time limit stays off: it is an alarm signal, which fails in any thread but the main one and then grades everything wrong.
    # The pool's deadline holds for all verifiers instead.
    return math_verify.parse(f"\\boxed{{{latex}}}", [math_verify.LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)


@lru_cache(maxsize=_CACHED)
def equal_by_math_verify(given: str, answer: str) -> bool:
    """Symbolic equality of two LaTeX answers by math-verify."""
    import math_verify

    return _gradable(given) and bool(math_verify.verify(_parsed(answer), _parsed(given), timeout_seconds=None))


def boxed_is_right(text: str, answer: str) -> bool:
    """The boxed answer equals the right one by mathruler, else by math-verify."""
    given = boxed_content(text)
    return given is not None and (equal_by_mathruler(given, answer) or equal_by_math_verify(given, answer))


def acc_score(text: str, answer: str) -> float:
    return float(boxed_is_right(text, answer))


def math_17k_acc_score(text: str, answer: str) -> float:
    given = boxed_content(text)
    return float(given is not None and equal_by_mathruler(given, answer))


def base_acc_score(text: str, answer: str) -> float:
    return math_17k_acc_score(text, answer) if thinks_then_answers(text) else 0.0


def math_verify_score(text: str, answer: str) -> float:
    given = boxed_content(text)
    return float(given is not None and thinks_then_answers(text) and equal_by_math_verify(given, answer))


_ANSWER_LINE = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")
_DAPO_TAIL = 300
# Normalisation of Minerva (arXiv 2206.14858, appendix D.1), in its order.
_SUBSTITUTIONS = (
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), (r"\ ", ""), (" ", ""), ("mbox", "text"),
    (",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}"),
)  # fmt: skip
_REMOVED = (
    "square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots", "sue", "points", "feet", "minutes",
    "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students", "childrentickets", "multiples",
    "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}", "\\text{}", r"\mathrm{th}", r"^\circ",
    r"^{\circ}", r"\;", r",\!", "{,}", '"', "\\dots",
)  # fmt: skip
_REWRITES = (
    (r"(.*?)(\$)(.*?)(\$)(.*)", r"$\3$"),
    (r"(\\text\{)(.*?)(\})", r"\2"),
    (r"(\\textbf\{)(.*?)(\})", r"\2"),
    (r"(\\overline\{)(.*?)(\})", r"\2"),
    (r"(\\boxed\{)(.*)(\})", r"\2"),
    (r"(frac)([^{])(.)", r"frac{\2}{\3}"),
    (r"(sqrt)([^{])", r"sqrt{\2}"),
)


def minerva_normalised(answer: str) -> str:
    r"""Example: minerva_normalised("x = 1,000 dollars") == "1000"."""
    answer = answer.split("=")[-1]
    for old, new in _SUBSTITUTIONS:
        answer = answer.replace(old, new)
    for expression in _REMOVED:
        answer = answer.replace(expression, "")
    for pattern, replacement in _REWRITES:
        answer = re.sub(pattern, replacement, answer)
    answer = answer.replace("$", "")
    return answer.replace(",", "").strip() if answer.replace(",", "").isdigit() else answer.strip()


def acc_for_dapo_score(text: str, answer: str) -> float:
    """1.0 when the last `Answer: ...` line of the last 300 characters is the right answer, string by string; else -1.0."""
    lines = _ANSWER_LINE.findall(text[-_DAPO_TAIL:])
    return 1.0 if lines and minerva_normalised(lines[-1]) == minerva_normalised(answer) else -1.0
