"""Pairs of answers that need no grader: the same string, two plain numbers, two words. They are most of what a policy gives."""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,9}|[0-9]{1,3}(?:,[0-9]{3}){1,2})(?:\.[0-9]{0,6})?")
"""Graders tell numbers apart up to 1e-7 and to 15 digits: within these bounds they say what exact arithmetic says."""
_FLOAT = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_WORDS = re.compile(r"(?:\\text\{)?([A-Za-z]|[A-Za-z ]*[A-Za-z]{4,}[A-Za-z ]*)\}?")
"""A choice or words. Two and three letters may be products of variables, whose order doesn't matter."""


def settled(given: str, answer: str) -> bool | None:
    """Is `given` right? None: only a grader can tell.

    Example: settled("1,000.0", "1000") is True, settled("55", "56") is False, settled("1/2", "0.5") is None.
    """
    given, answer = given.strip(), answer.strip()
    if given == answer:
        return bool(given)
    kinds = _kind(given), _kind(answer)
    # A sentence may hold the letter of a choice.
    if None in kinds or sorted(len(kind) == 1 for kind in kinds if isinstance(kind, str)) == [False, True]:
        return None
    return kinds[0] == kinds[1]


def number(text: str) -> float | None:
    """A decimal number, which may have thousands' commas and an exponent. Example: number("1,250.5") == 1250.5."""
    match = _FLOAT.fullmatch(text.strip())
    return float(match[0].replace(",", "")) if match else None


def _kind(text: str) -> Decimal | str | None:
    """The number or the words that a text is; numbers are never equal to words."""
    if _NUMBER.fullmatch(text):
        return Decimal(text.replace(",", ""))
    words = _WORDS.fullmatch(text)
    return " ".join(words[1].casefold().split()) if words else None
