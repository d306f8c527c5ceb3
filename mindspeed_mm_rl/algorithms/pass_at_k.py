"""Accuracy of several samples per prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import comb


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Chance that at least one of k samples is right: 1 - C(n - c, k) / C(n, k), unbiased (arXiv 2107.03374, eq. 1).

    Example: pass_at_k(4, 1, 2) == 0.5. Raises ValueError unless 1 <= k <= num_samples and 0 <= num_right <= num_samples.
    """
    if not (1 <= k <= num_samples and 0 <= num_right <= num_samples):
        raise ValueError(f"pass@{k} of {num_right} right among {num_samples} samples has no meaning")
    return 1.0 - comb(num_samples - num_right, k) / comb(num_samples, k)


def accuracies(num_right: Sequence[int], num_samples: int) -> dict[str, float]:
    """Means over prompts: `mean@n`, the share of right samples, and pass@k for k = 1, 2, 4, ... and n.

    num_right: right ones among the num_samples of each prompt.
    Example: accuracies([1, 0], 2) == {"mean@2": 0.25, "pass@1": 0.25, "pass@2": 0.5}
    """
    values = {f"mean@{num_samples}": sum(num_right) / (num_samples * len(num_right))}
    return values | {f"pass@{k}": sum(pass_at_k(num_samples, c, k) for c in num_right) / len(num_right) for k in _ks(num_samples)}


def _ks(num_samples: int) -> Iterator[int]:
    k = 1
    while k < num_samples:
        yield k
        k *= 2
    yield num_samples
