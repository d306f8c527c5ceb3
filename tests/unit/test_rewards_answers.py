"""Pairs of answers that graders are known to get wrong, with the verdict that mathematics gives, and answers made to do harm."""

from __future__ import annotations

import pytest

from mindspeed_mm_rl.rewards.math import equal_by_math_verify, equal_by_mathruler
from mindspeed_mm_rl.rewards.matheval import lenient_equal
from mindspeed_mm_rl.rewards.plain import settled

RIGHT, WRONG = True, False
STRICT, VERIFY, LENIENT = "equal_by_mathruler", "equal_by_math_verify", "lenient_equal"
ALL = (STRICT, VERIFY, LENIENT)
KIND = (VERIFY, LENIENT)
"""What a grader asks of the form: mathruler wants fractions reduced and decimals where the answer has them."""
PAIRS = [
    # numbers
    ("1,000", "1000", RIGHT, ALL),
    ("12{,}345", "12345", RIGHT, ALL),
    ("1.0", "1", RIGHT, ALL),
    ("007", "7", RIGHT, ALL),
    ("+5", "5", RIGHT, ALL),
    (".5", "0.5", RIGHT, ALL),
    ("1e3", "1000", RIGHT, (STRICT, LENIENT)),
    ("10^3", "1000", RIGHT, KIND),
    ("5!", "120", RIGHT, KIND),
    ("-5", "5", WRONG, ALL),
    ("100000", "100001", WRONG, ALL),
    ("1,2", "12", WRONG, ALL),
    ("1,234", "1,2,3,4", WRONG, ALL),
    ("", "5", WRONG, ALL),
    ("None", "5", WRONG, ALL),
    # fractions and decimals
    ("0.5", "\\frac12", RIGHT, ALL),
    ("\\dfrac{3}{4}", "\\frac34", RIGHT, ALL),
    ("3/4", "\\frac34", RIGHT, ALL),
    ("6/8", "\\frac34", RIGHT, KIND),
    ("6/8", "\\frac34", WRONG, (STRICT,)),
    ("-\\frac{1}{2}", "\\frac{-1}{2}", RIGHT, ALL),
    ("\\frac12", "-\\frac12", WRONG, ALL),
    ("1\\frac{1}{2}", "\\frac{3}{2}", RIGHT, ALL),
    ("1 \\frac{3}{4}", "1.75", RIGHT, ALL),
    ("0.333", "\\frac13", WRONG, ALL),
    ("0.33333", "\\frac13", RIGHT, (LENIENT,)),
    # percent, money, units, degrees
    ("50\\%", "50", RIGHT, ALL),
    ("50", "50\\%", RIGHT, ALL),
    ("50\\%", "0.5", RIGHT, KIND),
    ("25\\%", "\\frac14", RIGHT, KIND),
    ("50", "5000", WRONG, ALL),
    ("\\$18.90", "18.9", RIGHT, ALL),
    ("5\\text{ cm}", "5", RIGHT, ALL),
    ("5 cm", "5", RIGHT, ALL),
    ("5\\text{ cm}^2", "5", RIGHT, ALL),
    ("5 cm", "6", WRONG, ALL),
    ("45^\\circ", "45", RIGHT, ALL),
    ("45", "45^{\\circ}", RIGHT, ALL),
    ("45°", "45", RIGHT, (LENIENT,)),
    # roots, constants, expressions
    ("2\\sqrt{3}", "\\sqrt{12}", RIGHT, ALL),
    ("12\\sqrt{3}", "12 \\sqrt { 2 }", WRONG, ALL),
    ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt 2}", RIGHT, ALL),
    ("\\sqrt{3}+\\sqrt{2}", "\\sqrt{2}+\\sqrt{3}", RIGHT, ALL),
    ("18", "18\\pi", WRONG, ALL),
    ("3.14", "\\pi", WRONG, ALL),
    ("x^2+2x+1", "(x+1)^2", RIGHT, ALL),
    ("(x+1)^3", "(x+1)^2", WRONG, ALL),
    ("3+4i", "4i+3", RIGHT, ALL),
    ("ab", "ba", RIGHT, ALL),
    # equations and names
    ("x=5", "5", RIGHT, ALL),
    ("5", "x=5", RIGHT, ALL),
    ("y=2x+1", "2x-y+1=0", RIGHT, KIND),
    ("x<3", "x>3", WRONG, ALL),
    ("x \\le 3", "x \\leq 3", RIGHT, ALL),
    # intervals, tuples, sets, matrices
    ("(1,2)", "(1, 2)", RIGHT, ALL),
    ("(1,2]", "[1,2]", WRONG, ALL),
    ("(2,1)", "(1,2)", WRONG, ALL),
    ("(1,2,3)", "(1,2)", WRONG, ALL),
    ("\\left(\\frac{1}{2},3\\right)", "(0.5,3)", RIGHT, ALL),
    ("(3,\\infty)\\cup(-\\infty,2)", "(-\\infty, 2) \\cup (3, \\infty)", RIGHT, KIND),
    ("\\{1,2\\}", "\\{2,1\\}", RIGHT, KIND),
    ("2,3", "3,2", RIGHT, KIND),
    ("\\pm 2", "2,-2", RIGHT, KIND),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2\\end{pmatrix}", RIGHT, ALL),
    ("\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", RIGHT, ALL),
    ("\\begin{pmatrix}0.5\\\\2\\end{pmatrix}", "\\begin{pmatrix}\\frac12\\\\2\\end{pmatrix}", RIGHT, KIND),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&3\\\\2&4\\end{pmatrix}", WRONG, ALL),
    # words and choices
    ("Evelyn", "\\text{Evelyn}", RIGHT, ALL),
    ("evelyn", "\\text{Evelyn}", RIGHT, ALL),
    ("Evelyn", "Bobby", WRONG, ALL),
    ("(B)", "B", RIGHT, ALL),
    ("\\text{(B)}", "B", RIGHT, ALL),
    ("A", "B", WRONG, ALL),
    ("B. 5", "B", RIGHT, (LENIENT,)),
    ("the choice is B", "B", RIGHT, (LENIENT,)),
    ("unknown", "42", WRONG, ALL),
    ("3.14159", "3.1416", RIGHT, (LENIENT,)),
    ("6:30", "6:00", WRONG, ALL),
]
GRADERS = {STRICT: equal_by_mathruler, VERIFY: equal_by_math_verify, LENIENT: lenient_equal}


@pytest.mark.parametrize("grader", ALL)
def test_verdicts(grader):
    judged = {(given, answer): verdict for given, answer, verdict, graders in PAIRS if grader in graders}
    assert len(judged) > 50
    assert {pair: GRADERS[grader](*pair) for pair in judged} == judged


def test_plain_pairs_are_settled_as_the_graders_would():
    """Whatever mathruler and math-verify say of numbers within the bounds."""
    import math_verify
    from mathruler.grader import grade_answer

    for given, answer in (
        ("5", "5.0"),
        ("5", "6"),
        ("0.25", "0.250"),
        ("-1.5", "1.5"),
        ("1,000", "1000"),
        ("0.000001", "0.000002"),
    ):
        verdict = settled(given, answer)
        parsed = [math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (answer, given)]
        assert verdict == grade_answer(given, answer) == math_verify.verify(*parsed, timeout_seconds=None), (given, answer)
    unsettled = [("1/2", "0.5"), ("0.1234567", "0.1234568"), ("12345678901", "12345678902"), ("xy", "yx"), ("5 cm", "5")]
    assert [settled(*pair) for pair in unsettled] == [None] * len(unsettled)


@pytest.mark.parametrize("grader", ALL)
def test_answers_of_any_length_are_compared_as_strings_and_not_evaluated(grader):
    equal = GRADERS[grader]
    assert equal("5" * 200_000, "5" * 200_000)
    assert not equal("5" * 200_000, "6")
    assert not equal("2**3" if grader == STRICT else "\\frac" * 200, "8")
    assert not equal("__import__('os')", "5")
