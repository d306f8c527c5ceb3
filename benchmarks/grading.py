"""How many answers per second do the verifiers grade? Through the pool that training uses, every answer a new one.

Example:
    python benchmarks/grading.py --workers 2
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.table import Table

from mindspeed_mm_rl.rewards.pool import RewardPool
from mindspeed_mm_rl.rewards.registry import VERIFIERS
from mindspeed_mm_rl.rewards.scoring import RewardSettings

SAMPLES = 8
Pair = tuple[str, str]
"""Given answer and right answer."""


def by_string_or_number(dice: random.Random) -> Pair:
    number = dice.randrange(10_000, 10_000_000)
    word = "".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=7))
    return dice.choice(
        [
            (f"{number}", f"{number}"),
            (f"{number}", f"{number + 1}"),
            (f"{number:,}", f"{number}"),
            (f"{number / 1000:.3f}", f"{number / 1000:.4f}"),
            (f"\\frac{{{number}}}{{7}}", f"\\frac{{{number}}}{{7}}"),
            (word, f"\\text{{{word}}}"),
            (word, f"\\text{{{word[::-1]}}}"),
        ]
    )


def by_symbols(dice: random.Random) -> Pair:
    a, b, c = (dice.randrange(2, 400) for _ in range(3))
    return dice.choice(
        [
            (f"\\frac{{{a * c}}}{{{b * c}}}", f"\\frac{{{a}}}{{{b}}}"),
            (f"\\sqrt{{{a * a * b}}}", f"{a}\\sqrt{{{b}}}"),
            (f"x^2+{a + b}x+{a * b}", f"(x+{a})(x+{b})"),
            (f"({a}, {b})", f"({a},{b + 1})"),
            (f"{a}\\pi+{b}", f"{b}+{a}\\pi"),
            (f"\\{{{a}, {b}\\}}", f"\\{{{b}, {a}\\}}"),
        ]
    )


def groups(make: Callable[[random.Random], Pair], count: int, seed: int) -> Iterator[tuple[list[str], str]]:
    """Responses of a usual length, in the shape that most verifiers ask for, and the right answer of the last of them."""
    dice = random.Random(seed)
    for _ in range(count):
        pairs = [make(dice) for _ in range(SAMPLES)]
        thought = "Let us see. " * dice.randrange(50, 150)
        texts = [f"<think>{thought}</think><answer>\\boxed{{{given}}}\nAnswer: {given}\n</answer>" for given, _ in pairs]
        yield texts, pairs[-1][1]


def answers_per_second(verifier: str, make: Callable[[random.Random], Pair], count: int, workers: int) -> float:
    work = list(groups(make, count, seed=7))
    settings = RewardSettings((verifier,), (1.0,), 0, 1.0, 2048, workers, 30.0)
    with RewardPool(settings) as pool:
        pool.wait_ready()
        # Grammars and modules that are loaded at the first use of a kind of answer.
        for texts, answer in groups(make, 2 * workers, seed=8):
            pool.submit(0, texts, [1] * SAMPLES, answer).result()
        start = time.perf_counter()
        futures = [pool.submit(index, texts, [1] * SAMPLES, answer) for index, (texts, answer) in enumerate(work)]
        graded = [future.result() for future in futures]
        seconds = time.perf_counter() - start
    assert not sum(group.timeouts + group.crashes for group in graded)
    return count * SAMPLES / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes that grade (2)")
    parser.add_argument("--answers", type=int, default=4000, help="settled by string or number, per verifier (4000)")
    parser.add_argument("--symbolic", type=int, default=400, help="answers that need symbols, per verifier (400)")
    parser.add_argument("--verifiers", nargs="*", default=list(VERIFIERS), help="all")
    chosen = parser.parse_args()
    table = Table("verifier", "string or number", "symbols", title=f"answers per second, {chosen.workers} processes")
    for verifier in chosen.verifiers:
        plain = answers_per_second(verifier, by_string_or_number, chosen.answers // SAMPLES, chosen.workers)
        symbols = answers_per_second(verifier, by_symbols, chosen.symbolic // SAMPLES, chosen.workers)
        table.add_row(verifier, f"{plain:,.0f}", f"{symbols:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
