"""Which samples go to which rank and into which packed forward pass. The loss never depends on either choice."""

from __future__ import annotations

from collections.abc import Sequence


def micro_batches(lengths: Sequence[int], max_tokens: int, max_samples: int = 0, together: int = 1) -> list[list[int]]:
    """Consecutive samples (so groups stay together) in bins of at most max_tokens; a longer single unit is a bin of its own.

    Example: micro_batches([3, 3, 5, 2], max_tokens=6) == [[0, 1], [2], [3]]
    max_samples: bound on samples in a bin, 0 = none. together: samples of a unit, which is never torn apart.
    """
    bins: list[list[int]] = []
    tokens = 0
    for start in range(0, len(lengths), together):
        unit = range(start, min(start + together, len(lengths)))
        length = sum(lengths[index] for index in unit)
        full = not bins or tokens + length > max_tokens or (max_samples and len(bins[-1]) + len(unit) > max_samples)
        if full:
            bins.append([])
            tokens = 0
        bins[-1] += unit
        tokens += length
    return bins


def balanced_shares(weights: Sequence[int], ranks: int) -> list[list[int]]:
    """Items to ranks, heaviest first to the lightest rank; each share in ascending order.

    Example: balanced_shares([9, 1, 5, 5], ranks=2) == [[0, 1], [2, 3]]
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        shares[rank].append(item)
        loads[rank] += weights[item]
    return [sorted(share) for share in shares]


def balanced_rows(lengths: Sequence[int], together: int, ranks: int) -> list[list[int]]:
    """Rows to ranks, balanced by tokens; groups of `together` neighbours, samples of one prompt, stay together.

    Example: balanced_rows([3, 2, 9, 9, 2, 2], together=2, ranks=2) == [[2, 3], [0, 1, 4, 5]]
    """
    weights = [sum(lengths[start : start + together]) for start in range(0, len(lengths), together)]
    return [[group * together + k for group in share for k in range(together)] for share in balanced_shares(weights, ranks)]
