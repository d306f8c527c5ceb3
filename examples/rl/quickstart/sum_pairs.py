"""Preference pairs of the sums in sums.py: the worked solution, and one that goes wrong on the way. The rule is arithmetic."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import sums

SLIPS = 0.3
"""Share of results that are wrong in a rejected solution; at least one is."""


def wrong_solution(chain: sums.Chain, rng: random.Random) -> str:
    """Example: wrong_solution(Chain(12, (5, -3)), rng) == "12+5=16,16-3=13\\boxed{13}"."""
    right = wrong = sums.solution(chain)
    while wrong == right:
        wrong = sums.solution(chain, rng, SLIPS)
    return wrong


def pair(chain: sums.Chain, rng: random.Random) -> dict[str, str]:
    """A training row in the columns of TRL."""
    return {"prompt": chain.question(), "chosen": sums.solution(chain), "rejected": wrong_solution(chain, rng)}


def write_pairs(data: Path, out: Path, seed: int) -> None:
    """Writes {train,test}.jsonl below `out` from the sums of the same splits below `data`, whole or not at all."""
    unfinished = out.with_name(out.name + ".partial")
    unfinished.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rng = random.Random(f"{seed}/{split}")
        chains = sums.read_chains(data / f"{split}.jsonl")
        (unfinished / f"{split}.jsonl").write_text("".join(json.dumps(pair(chain, rng)) + "\n" for chain in chains))
    os.replace(unfinished, out)
