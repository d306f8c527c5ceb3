"""The verifier `acc`: extraction and comparison as the evaluation scripts of MATH do it, kinder than PRM800K's to the form of an answer.

Right are: the same string; the same choice; equal integers, and other numbers that differ by at most 1e-4 of their size; where one has a
percent sign, also a hundredth and the hundredfold; brackets and matrices that are right element by element; the same equation; the same
expression.
"""

from __future__ import annotations

import re
from math import isclose

from mindspeed_mm_rl.rewards.math import MAX_ANSWER_CHARACTERS, equal_by_math_verify, parsed
from mindspeed_mm_rl.rewards.plain import number, settled

NO_BOX, WRONG, RIGHT = -1.0, -0.5, 1.0
_RELATIVE = 1e-4
_ASSISTANT = "<|im_start|>assistant"
_DEPTH = {"{": 1, "}": -1}
_STOP_WORDS = ("</s>", "<|im_end|>", "<|endoftext|>")
_DELETED = (
    "\n", "\\!", "\\,", "\\;", "\\left", "\\right", "^{\\circ}", "^\\circ", "°", "\\$", "$", "\\(", "\\)", "\\%", "%",
)  # fmt: skip
_REPLACED = (("tfrac", "frac"), ("dfrac", "frac"), ("bmatrix", "pmatrix"), ("\\neq", "\\ne"), ("\\leq", "\\le"), ("\\geq", "\\ge"))
_UNIT = re.compile(
    r"(?<=[0-9}) ])\s*(?:percent|degrees?|dollars?|cents?|inch(?:es)?|feet|foot|miles?|yards?|[kcm]?m|k?g|met(?:er|re)s?|kilometers?"
    r"|centimeters?|square|cubic|units?|hours?|minutes?|seconds?|days?|weeks?|months?|years?|people|students?|mph)(?:\^\{?[23]\}?)?\.?$"
)
_LAST_TEXT = re.compile(r"\\(?:text|mbox|mathrm)\s*\{[^{}]*\}(?:\^\{?[23]\}?)?$")
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}")
_NAMED = re.compile(r"[A-Za-z]{1,2}(?:=|\\in(?![a-z]))(.+)")
_MATRIX = re.compile(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}")


def acc_score(text: str, answer: str) -> float:
    """1.0 right, -0.5 wrong, -1.0 without an answer in a box."""
    given = _extracted(text)
    if not given or "boxed" not in text:
        return NO_BOX
    return RIGHT if lenient_equal(given, answer) else WRONG


def lenient_equal(given: str, answer: str) -> bool:
    """Is `given` right, as the module's first lines say?"""
    verdict = settled(given, answer)
    if verdict or len(given) > MAX_ANSWER_CHARACTERS:
        return bool(verdict)
    if verdict is False:
        return bool(numbers := _numbers(given, answer)) and _near(numbers)
    if answer in tuple("ABCDE"):
        choices = re.findall(r"\b[A-E]\b", given.upper())
        return bool(choices) and choices[-1] == answer
    plain = _normalised(given), _normalised(answer)
    if "%" in given + answer and (numbers := _numbers(*plain)):
        return any(isclose(numbers[0], numbers[1] * factor, rel_tol=_RELATIVE) for factor in (0.01, 1, 100))
    return _equal(*plain) or ("%" in given + answer and equal_by_math_verify(given, answer))


def _extracted(text: str) -> str:
    """What stands in the last box, to the end of the text when its braces don't close; empty without one."""
    start = text.find(_ASSISTANT)
    text = text[max(start, 0) :]
    for word in _STOP_WORDS:
        text = text.partition(word)[0].strip()
    _, box, rest = text.rpartition("boxed")
    if not box or not rest.startswith("{"):
        return rest.partition("$")[0].strip() if box else ""
    depth = 0
    for position, character in enumerate(rest):
        depth += _DEPTH.get(character, 0)
        if depth == 0:
            return rest[1:position].strip()
    return rest[1:].strip()


def _normalised(answer: str) -> str:
    """Without units, signs of degrees, dollars and percent, and blanks."""
    for deleted in _DELETED:
        answer = answer.replace(deleted, "")
    for old, new in _REPLACED:
        answer = answer.replace(old, new)
    answer = answer.strip().rstrip(".")
    for unit in (_LAST_TEXT, _UNIT):
        answer = unit.sub("", answer).strip() or answer
    answer = _TEXT.sub(r"\1", answer).replace(" ", "")
    return f"0{answer}" if answer.startswith(".") else answer


def _equal(given: str, answer: str) -> bool:
    if given.casefold() == answer.casefold():
        return True
    if numbers := _numbers(given, answer):
        return _near(numbers)
    named = _NAMED.fullmatch(given), _NAMED.fullmatch(answer)
    if bool(named[0]) != bool(named[1]) and "=" not in (answer if named[0] else given):
        return _equal(named[0][1] if named[0] else given, named[1][1] if named[1] else answer)
    elements = _elements(given), _elements(answer)
    if elements[0] and elements[1]:
        return len(elements[0]) == len(elements[1]) and all(map(_equal, *elements))
    return equal_by_math_verify(given, answer) or _close(given, answer)


def _near(numbers: tuple[float, float]) -> bool:
    return numbers[0] == numbers[1] if all(value.is_integer() for value in numbers) else isclose(*numbers, rel_tol=_RELATIVE)


def _numbers(given: str, answer: str) -> tuple[float, float] | None:
    values = number(given), number(answer)
    return None if values[0] is None or values[1] is None else (values[0], values[1])


def _elements(answer: str) -> list[str]:
    """Of a tuple, an interval or a matrix, its brackets first; empty for everything else."""
    if matrix := _MATRIX.fullmatch(answer):
        rows = [row for row in matrix[1].split("\\\\") if row]
        return [str(len(rows)), *(element for row in rows for element in row.split("&"))]
    if len(answer) > 2 and answer[0] in "([" and answer[-1] in ")]" and not set("()[]") & set(answer[1:-1]) and "," in answer:
        return [answer[0], answer[-1], *answer[1:-1].split(",")]
    return []


def _close(given: str, answer: str) -> bool:
    """Two expressions without unknowns whose values differ by at most 1e-4 of their size."""
    values = [_value(text) for text in (given, answer)]
    return values[0] is not None and values[1] is not None and isclose(values[0], values[1], rel_tol=_RELATIVE)


def _value(latex: str) -> float | None:
    from sympy import Expr

    expression = next(iter(parsed(latex)), None)
    if not isinstance(expression, Expr) or not expression.is_number:
        return None
    try:
        return float(expression.evalf(15))
    except (TypeError, ValueError, ArithmeticError):
        return None
