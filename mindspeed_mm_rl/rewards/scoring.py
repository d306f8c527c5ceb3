"""From verifier scores to rewards: routes, weights, penalties, and accuracy apart from the score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mindspeed_mm_rl.rewards import custom
from mindspeed_mm_rl.rewards.registry import REWARD_MODEL, VERIFIERS, check_verifiers, find_verifier, judge_name, killed_scores, label
from mindspeed_mm_rl.rewards.registry import score_names as labels_of

_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Rule:
    """Verifiers and their weights, for all data or for one source."""

    verifiers: tuple[str, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.verifiers or len(self.verifiers) != len(self.weights):
            raise ValueError(
                f"rl_config.verifier_function {list(self.verifiers)} and rl_config.verifier_weight {list(self.weights)} "
                "must have the same length, at least 1"
            )
        check_verifiers(self.verifiers)

    @property
    def asks_model(self) -> bool:
        return REWARD_MODEL in self.verifiers


@dataclass(frozen=True)
class RewardSettings:
    """Field for field the reward part of a run's plan. Example: RewardSettings(**dataclasses.asdict(plan.reward)).

    Raises:
        ValueError: an unknown verifier, weights that don't match the verifiers, or a bound that makes no sense.
    """

    verifiers: tuple[str, ...]
    weights: tuple[float, ...]
    overlong_buffer: int
    """Tokens before max_tokens in which the penalty grows from 0 to its factor; 0 = no penalty."""
    overlong_penalty_factor: float
    max_tokens: int
    workers: int
    timeout_seconds: float
    """Bound for grading one sample."""
    by_source: tuple[tuple[str, tuple[str, ...], tuple[float, ...]], ...] = ()
    """(data_source, verifiers, weights): samples of exactly that source are graded so, all others by `verifiers`."""
    reward_model: str = ""
    """Folder of the sequence classifier that scores as `reward_model`; empty = none."""
    reward_model_timeout: float = 120.0
    """Seconds for the samples of one prompt."""

    def __post_init__(self) -> None:
        names = [name for rule in self.rules.values() for name in rule.verifiers]
        check_verifiers(names)
        if self.asks_model and not self.reward_model:
            raise ValueError(f"the verifiers {sorted(set(names))} name {REWARD_MODEL}, but rl_config.reward_model is not given")
        if self.overlong_buffer and not 0 < self.overlong_buffer < self.max_tokens:
            raise ValueError(f"rl_config.overlong_buffer ({self.overlong_buffer}) must be below max_tokens ({self.max_tokens})")
        if self.workers < 1 or self.timeout_seconds <= 0:
            raise ValueError(f"rewards need workers >= 1 and timeout_seconds > 0, but got {self.workers} and {self.timeout_seconds}")

    @property
    def rules(self) -> dict[str, Rule]:
        """The rule of each source; that of all others under the empty name."""
        return {"": Rule(self.verifiers, self.weights)} | {source: Rule(names, weights) for source, names, weights in self.by_source}

    @property
    def asks_model(self) -> bool:
        return any(rule.asks_model for rule in self.rules.values())

    def rule(self, data_source: str) -> Rule:
        return next(
            (Rule(names, weights) for source, names, weights in self.by_source if source == data_source), Rule(self.verifiers, self.weights)
        )


@dataclass(frozen=True)
class Question:
    """What the samples of a prompt are graded against. Example: Question("55", "hiyouga/geometry3k")."""

    answer: str
    data_source: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    """extra_info of the row, for users' functions."""


@dataclass(frozen=True)
class SampleScore:
    scores: dict[str, float]
    """Label of a verifier (or part) -> raw score."""
    accuracy: float
    """1.0 right, 0.0 wrong."""
    metrics: dict[str, float] = field(default_factory=dict)
    """`function/name` -> other numbers of users' functions."""


@dataclass(frozen=True)
class GroupScores:
    """What the rewards say of the samples of one prompt; lists have one value per sample, in the order given."""

    scores: dict[str, list[float]]
    """Label of a verifier (or part) -> raw scores, before weights and penalties."""
    accuracy: list[float]
    """1.0 right, 0.0 wrong."""
    rewards: list[float]
    """Weighted sum of the verifiers, with the overlong penalty."""
    overlong_penalties: list[float]
    """Already in `rewards`; <= 0."""
    timeouts: int = 0
    """Samples graded wrong because their grading ran out of time."""
    crashes: int = 0
    """Samples graded wrong because their grading raised, used too much memory, or ended its process."""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """`function/name` -> other numbers of users' functions, of those samples that have them."""
    model_interval: tuple[float, float] | None = None
    """When the reward model was at work on this group, in seconds of time.perf_counter."""


def overlong_penalty(length: int, max_tokens: int, buffer: int, factor: float) -> float:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13): from 0 at max_tokens - buffer down to -factor at max_tokens.

    Example: overlong_penalty(1792, max_tokens=2048, buffer=512, factor=1.0) == -0.5
    """
    if buffer == 0:
        return 0.0
    excess = min(length - (max_tokens - buffer), buffer)
    return min(-excess / buffer * factor, 0.0)


def score_sample(text: str, question: Question, verifiers: Sequence[str]) -> SampleScore:
    """Everything but the reward model, which has a process of its own."""
    functions = {name: custom.grade(name, question.data_source, text, question.answer, question.extra) for name in _functions(verifiers)}
    scores = {name: VERIFIERS[name].score(text, question.answer) for name in labels_of(verifiers) if name in VERIFIERS}
    scores |= {label(name): verdict.score for name, verdict in functions.items()}
    metrics = {f"{label(name)}/{key}": value for name, verdict in functions.items() for key, value in verdict.metrics.items()}
    judge = judge_name(verifiers)
    if judge in functions:
        return SampleScore(scores, float(functions[judge].is_right), metrics)
    rule = find_verifier(judge)
    verdict = scores[judge] if judge in scores else rule.score(text, question.answer)
    return SampleScore(scores, float(verdict >= rule.right), metrics)


def _functions(verifiers: Sequence[str]) -> list[str]:
    return [name for name in verifiers if custom.is_function(name)]


def killed_sample(verifiers: Sequence[str]) -> SampleScore:
    """What a response gets whose grading had to be killed."""
    return SampleScore(killed_scores(verifiers), 0.0)


def weigh(
    samples: Sequence[SampleScore],
    token_lengths: Sequence[int],
    settings: RewardSettings,
    rule: Rule | None = None,
    model_scores: Sequence[float] | None = None,
    timeouts: int = 0,
    crashes: int = 0,
) -> GroupScores:
    """Puts the samples of a prompt together. token_lengths: response tokens of each; rule: None for that of all data.

    Raises:
        ValueError: not one length, or model score, per sample.
    """
    rule = rule or settings.rule("")
    if len(samples) != len(token_lengths) or (model_scores is not None and len(model_scores) != len(samples)):
        raise ValueError(f"{len(samples)} responses to grade but {len(token_lengths)} lengths")
    penalties = [
        overlong_penalty(length, settings.max_tokens, settings.overlong_buffer, settings.overlong_penalty_factor)
        for length in token_lengths
    ]
    scores = {name: [sample.scores[name] for sample in samples] for name in labels_of(rule.verifiers) if name != REWARD_MODEL}
    if model_scores is not None:
        scores[REWARD_MODEL] = list(model_scores)
    terms = [(scores[label(name)], weight) for name, weight in zip(rule.verifiers, rule.weights, strict=True)]
    rewards = [sum(weight * column[index] for column, weight in terms) + penalty for index, penalty in enumerate(penalties)]
    keys = dict.fromkeys(key for sample in samples for key in sample.metrics)
    return GroupScores(
        scores=scores,
        accuracy=[sample.accuracy for sample in samples],
        rewards=rewards,
        overlong_penalties=penalties,
        timeouts=timeouts,
        crashes=crashes,
        metrics={key: [sample.metrics[key] for sample in samples if key in sample.metrics] for key in keys},
    )


def grading_error(where: str, answer: str, text: str, verifiers: Sequence[str], cause: str) -> RuntimeError:
    """A verifier raised: a fault of the program, never of the response. `where` names sample and prompt."""
    return RuntimeError(
        f"a verifier of {list(verifiers)} failed on {where} (answer {answer!r}, response ends in {text[-_SHOWN_CHARACTERS:]!r}):\n{cause}"
    )


def score_group(texts: Sequence[str], token_lengths: Sequence[int], question: Question, settings: RewardSettings) -> GroupScores:
    """Grades the responses to one prompt in this process, without a deadline; training grades through RewardPool."""
    rule = settings.rule(question.data_source)
    samples = []
    for index, text in enumerate(texts):
        try:
            samples.append(score_sample(text, question, rule.verifiers))
        except Exception as error:
            where = f"sample {index} of a prompt of {question.data_source!r}"
            raise grading_error(where, question.answer, text, rule.verifiers, repr(error)) from error
    return weigh(samples, token_lengths, settings, rule)
