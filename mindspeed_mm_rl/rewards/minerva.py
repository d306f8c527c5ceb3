"""String-by-string verifiers: the last `Answer: ...` line (DAPO) and the exact box at the very end (ReTool)."""

from __future__ import annotations

import re

from mindspeed_mm_rl.rewards.format import boxed_content

_TAIL = 300
"""Characters at the end of a response that are looked at."""
_BOX_TAIL = 100
_ANSWER_LINE = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")
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
    lines = _ANSWER_LINE.findall(text[-_TAIL:])
    return 1.0 if lines and minerva_normalised(lines[-1]) == minerva_normalised(answer) else -1.0


def retool_score(text: str, answer: str) -> float:
    """1.0 when the last box of the last 100 characters holds the right answer, character by character; else -1.0."""
    start = text.rfind("\\boxed{", max(0, len(text) - _BOX_TAIL))
    return 1.0 if start >= 0 and boxed_content(text[start:]) == answer else -1.0
