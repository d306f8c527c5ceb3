"""One record of a data set to one sample: question, earlier turns, system message and responses, whatever columns they stand in."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from mindspeed_mm_rl.data.preprocess.records import Record
from mindspeed_mm_rl.data.preprocess.settings import MapKeys
from mindspeed_mm_rl.data.preprocess.templates import Turn

_GROUND_TRUTH = "ground_truth"


class Dropped(Exception):
    """The record can't become a sample; the message is the reason it is counted under."""


@dataclass(frozen=True)
class Columns:
    """The column of each role, "" where there is none. Example: Columns(prompt="problem", response="answer")."""

    prompt: str
    query: str = ""
    system: str = ""
    history: str = ""
    response: str = ""
    chosen: str = ""
    rejected: str = ""
    additional: tuple[str, ...] = ()

    @staticmethod
    def resolve(map_keys: MapKeys, additional: Sequence[str], roles: Collection[str], present: Collection[str]) -> Columns:
        """roles: those a sample can't do without; present: the data set's columns. Raises ValueError for a column that isn't there."""
        there = f"its columns are {', '.join(present)}"
        found = {}
        for role, column in map_keys.model_dump().items():
            if column in present:
                found[role] = column
            elif column and role in map_keys.model_fields_set:
                raise ValueError(f"map_keys.{role}: the data set has no column '{column}'; {there}")
        for role in roles:
            if role not in found:
                default = f" and no column '{MapKeys().model_dump()[role]}'" if role not in map_keys.model_fields_set else ""
                raise ValueError(f"map_keys doesn't say which column is the {role}{default}; {there}")
        if missing := [column for column in additional if column not in present]:
            raise ValueError(f"dataset_additional_keys: the data set has no column '{missing[0]}'; {there}")
        return Columns(**found, additional=tuple(additional))


@dataclass(frozen=True)
class Sample:
    """Example: Sample("train.jsonl, row 3", "", (), "2 + 3?", ("5",), {})."""

    where: str
    system: str
    history: tuple[Turn, ...]
    question: str
    responses: tuple[str, ...]
    """The answer; of a pair, the chosen and the rejected response."""
    additional: dict[str, str]
    """Texts of the additional columns."""


def sample_of(record: Record, where: str, columns: Columns, pairwise: bool) -> Sample:
    """Raises Dropped for what a record lacks, ValueError naming file and row for a column of the wrong kind."""
    system, history, question = _dialogue(record.get(columns.prompt), where, columns.prompt)
    question = "\n".join(text for text in (question, _text(record.get(columns.query), where, columns.query)) if text)
    if not question.strip():
        raise Dropped("no prompt")
    responses = _pair(record, where, columns) if pairwise else (_response(record.get(columns.response), where, columns.response),)
    if not all(response.strip() for response in responses):
        raise Dropped("no response")
    return Sample(
        where=where,
        system=_text(record.get(columns.system), where, columns.system) or system,
        history=(*_history(record.get(columns.history), where, columns.history), *history),
        question=question,
        responses=responses,
        additional={column: _as_text(record.get(column)) for column in columns.additional},
    )


def _dialogue(value: Any, where: str, column: str) -> tuple[str, tuple[Turn, ...], str]:
    """System message, earlier turns and last question of a prompt that is a text or a list of messages."""
    if not isinstance(value, list) or not value:
        return "", (), _text(value or "", where, column)
    texts = [_message(message, where, column) for message in value]
    roles = [message.get("role") for message in value]
    leading = 1 if roles[0] == "system" else 0
    expected = ["user" if i % 2 == 0 else "assistant" for i in range(len(roles) - leading)]
    if roles[leading:] != expected or not expected or expected[-1] != "user":
        raise ValueError(
            f"{where}: the messages of column '{column}' must be a system message, if any, then user and assistant in turn, a user last;"
            f" they are {', '.join(map(str, roles))}"
        )
    said = texts[leading:]
    return "".join(texts[:leading]), tuple(zip(said[:-1:2], said[1::2], strict=True)), said[-1]


def _message(message: Any, where: str, column: str) -> str:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise ValueError(f"{where}: a message of column '{column}' lacks the text of its content: {message!r}")
    return message["content"]


def _history(value: Any, where: str, column: str) -> tuple[Turn, ...]:
    if value is not None and not isinstance(value, list):
        raise ValueError(f"{where}: column '{column}' must be a list of [question, answer], not {type(value).__name__}")
    turns = value or []
    if not all(isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in turns):
        raise ValueError(f"{where}: a turn of column '{column}' isn't [question, answer]")
    return tuple((question, answer) for question, answer in turns)


def _response(value: Any, where: str, column: str) -> str:
    if isinstance(value, dict):
        # A response column of verl rows is reward_model.
        return _text(value.get(_GROUND_TRUTH), where, f"{column}.{_GROUND_TRUTH}")
    if isinstance(value, list):
        if len(value) > 1:
            raise Dropped("more than one response")
        return _ranked(value, 0, where, column)
    return _text(value, where, column)


def _pair(record: Record, where: str, columns: Columns) -> tuple[str, ...]:
    chosen, rejected = record.get(columns.chosen), record.get(columns.rejected)
    return _ranked(chosen, 0, where, columns.chosen), _ranked(rejected, 1, where, columns.rejected)


def _ranked(value: Any, rank: int, where: str, column: str) -> str:
    """A response of a pair: a text, a dialogue whose last message it is, or both responses in one list, the better one first."""
    if not isinstance(value, list):
        return _text(value, where, column)
    if not value:
        return ""
    if isinstance(value[-1], dict):
        return _message(value[-1], where, column)
    return _text(value[min(rank, len(value) - 1)], where, column)


def _text(value: Any, where: str, column: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int | float):
        return str(value)
    raise ValueError(f"{where}: column '{column}' must hold text, not {type(value).__name__}; map_keys says which column is what")


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
