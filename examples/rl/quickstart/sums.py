"""Chains of additions and subtractions, "12 + 5 - 3 =", as training rows: arithmetic that a rule checks (like reasoning-gym's chain_sum).

No chain is drawn twice, so what is held out was never seen. Running totals stay at or above 0: a sign would be one more thing to learn.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TERMS = 4
LARGEST = 9
"""Of the numbers that are written; totals reach three times as high."""
SPLITS = {"warm_start/train": 3000, "warm_start/test": 200, "rl/train": 6000, "rl/test": 256}
DATA_SOURCE = "chain_sum"
SLIPS = (-10, -3, -2, -1, 1, 2, 3, 10)
"""How far off a result is that somebody gets slightly wrong."""


@dataclass(frozen=True)
class Chain:
    """Example: Chain(12, (5, -3)).question() == "12 + 5 - 3 ="."""

    first: int
    changes: tuple[int, ...]

    def question(self) -> str:
        return " ".join([str(self.first), *(f"{sign_of(change)} {abs(change)}" for change in self.changes), "="])

    def answer(self) -> int:
        return self.first + sum(self.changes)


def sign_of(change: int) -> str:
    return "+" if change > 0 else "-"


def solution(chain: Chain, rng: random.Random | None = None, slips: float = 0.0) -> str:
    """The response that the warm start teaches; a share `slips` of its results is wrong, and what follows goes on from the wrong one.

    Example: solution(Chain(12, (5, -3))) == "12+5=17,17-3=14\\boxed{14}".
    """
    total, lines = chain.first, []
    for change in chain.changes:
        result = total + change
        if rng is not None and rng.random() < slips:
            result = max(0, result + rng.choice(SLIPS))
        lines.append(f"{total}{sign_of(change)}{abs(change)}={result}")
        total = result
    return f"{','.join(lines)}\\boxed{{{total}}}"


def draw(rng: random.Random) -> Chain:
    first = total = rng.randint(1, LARGEST)
    changes = []
    for _ in range(TERMS - 1):
        number = rng.randint(1, LARGEST)
        change = -number if rng.random() < 0.5 and number <= total else number
        changes.append(change)
        total += change
    return Chain(first, tuple(changes))


def new_chains(rng: random.Random, count: int, seen: set[Chain]) -> Iterator[Chain]:
    """Chains none of which is in `seen`; what was drawn is added to it."""
    for _ in range(count):
        chain = draw(rng)
        while chain in seen:
            chain = draw(rng)
        seen.add(chain)
        yield chain


def row(chain: Chain, split: str, index: int) -> dict[str, object]:
    """A training row in the columns of verl."""
    answer = str(chain.answer())
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": chain.question()}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"split": split, "index": index, "answer": answer},
    }


def read_chains(path: Path) -> list[Chain]:
    return [parse(json.loads(line)["prompt"][0]["content"]) for line in path.read_text().splitlines()]


def parse(question: str) -> Chain:
    """Example: parse("12 + 5 - 3 =") == Chain(12, (5, -3))."""
    first, *rest = question.removesuffix(" =").split(" ")
    return Chain(int(first), tuple(int(sign + number) for sign, number in zip(rest[::2], rest[1::2], strict=True)))


def write_splits(out: Path, seed: int) -> None:
    """Writes {warm_start,rl}/{train,test}.jsonl below `out`, in a place of their own until all are there."""
    unfinished, seen = out.with_name(out.name + ".partial"), set()
    for index, (name, count) in enumerate(SPLITS.items()):
        path = unfinished / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        chains = new_chains(random.Random(f"{seed}/{index}"), count, seen)
        path.write_text("".join(json.dumps(row(chain, path.stem, number)) + "\n" for number, chain in enumerate(chains)))
    os.replace(unfinished, out)
