"""The default reward of geometry3k: mostly accuracy, a little for the asked shape."""

from __future__ import annotations

from mindspeed_mm_rl.rewards.format import format_score
from mindspeed_mm_rl.rewards.math import acc_score

ACCURACY_WEIGHT = 0.9
FORMAT_WEIGHT = 0.1


def geo3k_score(text: str, answer: str) -> float:
    return ACCURACY_WEIGHT * acc_score(text, answer) + FORMAT_WEIGHT * format_score(text, answer)
