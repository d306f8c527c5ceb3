"""Which groups are worth training on (dynamic sampling, DAPO, arXiv 2503.14476, section 3.2)."""

from __future__ import annotations

import difflib
import re

from mindspeed_mm_rl.types import Group

ACCURACY_METRICS = ("accuracy", "acc", "acc_for_dapo")
"""Names under which users ask for right-or-wrong; without a verifier of that name they mean Group.accuracy."""
SCORE_METRIC = "score"
"""The reward that training uses, weights and penalties included."""

_DECORATED = re.compile(r"^(?:train/)?(?:(?:grpo|dapo)/)?(?P<name>.+?)(?:_rewards/mean)?$")


def metric_name(spelling: str) -> str:
    """The verifier in a metric's name. Example: metric_name("grpo/acc_for_dapo_rewards/mean") == "acc_for_dapo"."""
    match = _DECORATED.match(spelling)
    return match["name"] if match else spelling


def check_metric(metric: str, score_names: tuple[str, ...]) -> None:
    """Before a run: `score_names` are the verifiers that will be computed.

    Raises:
        ValueError: no score of that name, with the nearest one that exists.
    """
    valid = (*score_names, *ACCURACY_METRICS, SCORE_METRIC)
    if metric in valid:
        return
    nearest = difflib.get_close_matches(metric, valid, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"rl_config.filter_groups_metric is {metric!r}, but the scores of this run are {', '.join(dict.fromkeys(valid))}; "
        f"did you mean {nearest!r}?"
    )


def metric_values(group: Group, metric: str) -> list[float]:
    """The metric per sample, raw: before weights and penalties (but for `score`)."""
    check_metric(metric, tuple(group.scores))
    if metric in group.scores:
        return group.scores[metric]
    return group.rewards if metric == SCORE_METRIC else group.accuracy


def has_spread(group: Group, metric: str) -> bool:
    """Keep a group iff its samples differ in the metric; a group of one sample is kept."""
    values = metric_values(group, metric)
    return len(values) == 1 or max(values) > min(values)
