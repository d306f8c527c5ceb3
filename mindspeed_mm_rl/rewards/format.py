"""Does a response have the shape that the prompt asked for? Linear scans: a backtracking regex can be made to crawl by a response."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice

BOXED = "\\boxed{"
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_THOUGHT_TO_ANSWER = re.compile(r"</think>\s*<answer>")
_ANSWER_END = re.compile(r"</answer>$", re.MULTILINE)
_STEP = re.compile(r"Step [0-9]+:|^[0-9]+\.|\n-|\n\*|First,|Second,|Next,|Finally,")
"""A numbered line counts only as the first line of the response."""


def _in_order(text: str, marks: tuple[str, ...]) -> bool:
    position = 0
    for mark in marks:
        found = text.find(mark, position)
        if found < 0:
            return False
        position = found + len(mark)
    return True


def boxed_content(text: str) -> str | None:
    r"""What stands in the last \boxed{...}, braces balanced; None without one.

    Example: boxed_content(r"so \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    """
    start = text.rfind(BOXED)
    if start < 0:
        return None
    start += len(BOXED)
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position].strip()
    return None


def thinks_then_boxes(text: str) -> bool:
    r"""The whole text matches <think>.*</think>.*\boxed{.*}.* (geometry3k's instruction)."""
    return text.startswith("<think>") and _in_order(text, ("<think>", "</think>", BOXED, "}"))


def thinks_then_answers(text: str) -> bool:
    r"""The whole text matches <think>.*</think>.*<answer>.*\boxed{.*}.*</answer>."""
    return (
        text.startswith("<think>")
        and text.endswith("</answer>")
        and _in_order(text, ("<think>", "</think>", "<answer>", BOXED, "}", "</answer>"))
    )


def geo3k_format_score(text: str, answer: str) -> float:
    return float(thinks_then_boxes(text))


def format_score(text: str, answer: str) -> float:
    """1.0 when a thought stands at the start and an answer right behind it, up to the end of a line."""
    thought_end = _THOUGHT_TO_ANSWER.search(text, len("<think>")) if text.startswith("<think>") else None
    return float(bool(thought_end and _ANSWER_END.search(text, thought_end.end())))


def strict_format_score(text: str, answer: str) -> float:
    """1.0 when every tag and one box stand exactly once, in order, the first and last tag at the very ends; else -0.5."""
    marks = [text.find(tag) for tag in _TAGS[:3]] + list(_boxes(text)) + [text.find(_TAGS[3])]
    once = all(text.count(tag) == 1 for tag in _TAGS) and len(marks) == 5 and marks == sorted(marks)
    return 1.0 if once and text.startswith(_TAGS[0]) and text.endswith(_TAGS[3]) else -0.5


def _boxes(text: str) -> Iterator[int]:
    """Where each box begins that closes, by any brace, on its line."""
    position = text.find(BOXED)
    while position >= 0:
        end = text.find("}", position)
        if end < 0:
            return
        newline = text.find("\n", position, end)
        if newline < 0:
            yield position
        position = text.find(BOXED, end if newline < 0 else newline)


def step_score(text: str, answer: str) -> float:
    """A third for every mark of a step, at most 1.0."""
    return min(1.0, sum(1 for _ in islice(_STEP.finditer(text), 3)) / 3)
