"""Does a response have the shape that the prompt asked for? Linear scans: a backtracking regex can be made to crawl by a response."""

from __future__ import annotations

BOXED = "\\boxed{"


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


def format_score(text: str, answer: str) -> float:
    return float(thinks_then_boxes(text))


def strict_format_score(text: str, answer: str) -> float:
    """1.0 when every tag stands exactly once, in order, at the ends, with a box in the answer; else -0.5."""
    text = text.strip()
    once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    return 1.0 if once and thinks_then_answers(text) else -0.5
