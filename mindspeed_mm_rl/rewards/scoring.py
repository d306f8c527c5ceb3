"""From verifier scores to rewards: weights, penalties, and accuracy apart from the score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mindspeed_mm_rl.rewards.registry import accuracy_name, find_verifier, score_names

_SHOWN_CHARACTERS = 200


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

    def __post_init__(self) -> None:
        if not self.verifiers or len(self.verifiers) != len(self.weights):
            raise ValueError(
                f"rl_config.verifier_function {list(self.verifiers)} and rl_config.verifier_weight {list(self.weights)} "
                "must have the same length, at least 1"
            )
        score_names(self.verifiers)
        if self.overlong_buffer and not 0 < self.overlong_buffer < self.max_tokens:
            raise ValueError(f"rl_config.overlong_buffer ({self.overlong_buffer}) must be below max_tokens ({self.max_tokens})")
        if self.workers < 1 or self.timeout_seconds <= 0:
            raise ValueError(f"rewards need workers >= 1 and timeout_seconds > 0, but got {self.workers} and {self.timeout_seconds}")


@dataclass(frozen=True)
class SampleScore:
    scores: dict[str, float]
    """Verifier (and part) name -> raw score."""
    accuracy: float
    """1.0 right, 0.0 wrong."""


@dataclass(frozen=True)
class GroupScores:
    """What the rewards say of the samples of one prompt; every list has one value per sample, in the order given."""

    scores: dict[str, list[float]]
    """Verifier (and part) name -> raw scores, before weights and penalties."""
    accuracy: list[float]
    """1.0 right, 0.0 wrong."""
    rewards: list[float]
    """Weighted sum of the configured verifiers, with the overlong penalty."""
    overlong_penalties: list[float]
    """Already in `rewards`; <= 0."""
    timeouts: int = 0
    """Samples graded wrong because their grading ran out of time."""
    crashes: int = 0
    """Samples graded wrong because their grading raised, used too much memory, or ended its process."""


def overlong_penalty(length: int, max_tokens: int, buffer: int, factor: float) -> float:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13): from 0 at max_tokens - buffer down to -factor at max_tokens.

    Example: overlong_penalty(1792, max_tokens=2048, buffer=512, factor=1.0) == -0.5
    """
    if buffer == 0:
        return 0.0
    excess = min(length - (max_tokens - buffer), buffer)
    return min(-excess / buffer * factor, 0.0)


def score_sample(text: str, answer: str, verifiers: Sequence[str]) -> SampleScore:
    scores = {name: find_verifier(name).score(text, answer) for name in score_names(verifiers)}
    judge = find_verifier(accuracy_name(verifiers))
    verdict = scores[judge.name] if judge.name in scores else judge.score(text, answer)
    return SampleScore(scores, float(verdict >= judge.right))


def wrong_sample(verifiers: Sequence[str]) -> SampleScore:
    """The lowest scores: what a response gets whose grading had to be killed."""
    return SampleScore({name: find_verifier(name).wrong for name in score_names(verifiers)}, 0.0)


def weigh(
    samples: Sequence[SampleScore], token_lengths: Sequence[int], settings: RewardSettings, timeouts: int = 0, crashes: int = 0
) -> GroupScores:
    """Puts the samples of a prompt together. token_lengths: response tokens of each.

    Raises:
        ValueError: not one length per sample.
    """
    if len(samples) != len(token_lengths):
        raise ValueError(f"{len(samples)} responses to grade but {len(token_lengths)} lengths")
    penalties = [
        overlong_penalty(length, settings.max_tokens, settings.overlong_buffer, settings.overlong_penalty_factor)
        for length in token_lengths
    ]
    terms = list(zip(settings.verifiers, settings.weights, strict=True))
    rewards = [
        sum(weight * sample.scores[name] for name, weight in terms) + penalty for sample, penalty in zip(samples, penalties, strict=True)
    ]
    return GroupScores(
        scores={name: [sample.scores[name] for sample in samples] for name in score_names(settings.verifiers)},
        accuracy=[sample.accuracy for sample in samples],
        rewards=rewards,
        overlong_penalties=penalties,
        timeouts=timeouts,
        crashes=crashes,
    )


def grading_error(where: str, answer: str, text: str, verifiers: Sequence[str], cause: str) -> RuntimeError:
    """A verifier raised: a fault of the program, never of the response. `where` names sample and prompt."""
    return RuntimeError(
        f"a verifier of {list(verifiers)} failed on {where} (answer {answer!r}, response ends in {text[-_SHOWN_CHARACTERS:]!r}):\n{cause}"
    )


def score_group(texts: Sequence[str], token_lengths: Sequence[int], answer: str, data_source: str, settings: RewardSettings) -> GroupScores:
    """Grades the responses to one prompt in this process, without a deadline; training grades through RewardPool."""
    samples = []
    for index, text in enumerate(texts):
        try:
            samples.append(score_sample(text, answer, settings.verifiers))
        except Exception as error:
            raise grading_error(f"sample {index} of a prompt of {data_source!r}", answer, text, settings.verifiers, repr(error)) from error
    return weigh(samples, token_lengths, settings)
