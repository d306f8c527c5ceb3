"""The default reward of geometry3k: mostly accuracy, a little for the asked shape."""

from __future__ import annotations

from mindspeed_mm_rl.rewards.format import geo3k_format_score
from mindspeed_mm_rl.rewards.math import geo3k_acc_score

ACCURACY_WEIGHT = 0.9
FORMAT_WEIGHT = 0.1


def geo3k_score(text: str, answer: str) -> float:
    return ACCURACY_WEIGHT * geo3k_acc_score(text, answer) + FORMAT_WEIGHT * geo3k_format_score(text, answer)
