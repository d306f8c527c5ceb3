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
Question = tuple[list[str], str]
"""What the samples of a prompt give, and the right answer."""


def by_string_or_number(dice: random.Random) -> Question:
    """Integers, decimals, fractions and words; half of the samples are right, some of them in another spelling."""
    number = dice.randrange(10_000, 10_000_000)
    word = "".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=7))
    right, spelled, wrong = dice.choice(
        [
            (f"{number}", f"{number:,}", f"{number + 1}"),
            (f"{number / 1000:.3f}", f"{number / 1000:.4f}", f"{number / 100:.3f}"),
            (f"\\frac{{{number}}}{{7}}", f"\\frac{{{number}}}{{7}}", f"\\frac{{{number}}}{{7}}"),
            (f"\\text{{{word}}}", word.title(), word[::-1]),
            (f"{number}", f"{number}.0", word),
        ]
    )
    return [right, spelled, right, spelled, wrong, wrong, wrong, wrong], right


def by_symbols(dice: random.Random) -> Question:
    """Every sample another expression; half of them are right."""
    a, b, c = (dice.randrange(2, 400) for _ in range(3))
    kind = dice.randrange(4)
    right = [f"\\frac{{{a}}}{{{b}}}", f"{a}\\sqrt{{{b}}}", f"(x+{a})(x+{b})", f"\\{{{a}, {b}\\}}"][kind]
    given = []
    for k in range(SAMPLES):
        d, e = c + k, b + k % 2
        given.append(
            [
                f"\\frac{{{a * d}}}{{{e * d}}}",
                f"\\frac{{{d * a}\\sqrt{{{e}}}}}{{{d}}}",
                f"x^2+{a + e}x+{a * b}+{d}-{d}",
                f"\\{{{e}, {a}, {a}\\}}",
            ][kind]
        )
    return given, right


def groups(make: Callable[[random.Random], Question], count: int, seed: int) -> Iterator[Question]:
    """Responses of a usual length, in the shape that most verifiers ask for."""
    dice = random.Random(seed)
    for _ in range(count):
        given, right = make(dice)
        thought = "Let us see. " * dice.randrange(50, 150)
        yield [f"<think>{thought}</think><answer>\\boxed{{{one}}}\nAnswer: {one}\n</answer>" for one in given], right


def answers_per_second(verifier: str, make: Callable[[random.Random], Question], count: int, workers: int) -> float:
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
    assert not sum(group.timeouts + group.crashes for group in graded), "an answer was not graded in time: the machine is too busy"
    return count * SAMPLES / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes that grade (2)")
    parser.add_argument("--answers", type=int, default=4000, help="settled by string or number, per verifier (4000)")
    parser.add_argument("--symbolic", type=int, default=160, help="answers that need symbols, per verifier (160)")
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
