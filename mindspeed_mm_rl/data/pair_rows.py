"""A preference pair as every kind of file gives it: rows of TRL (`prompt, chosen, rejected`), of orca_dpo_pairs (`system, question, chosen,
rejected`), and prepared columns.

`prompt` is a text (one message of the user) or a list of messages. `chosen` and `rejected` are texts, single messages or lists of them: the
answer alone, or the whole conversation with the answer at its end; what stands before it is the prompt, which then needs no column.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_mm_rl.data.indexed import column_files, column_name, open_columns
from mindspeed_mm_rl.data.rows import BadRow, Columns, Row, Rows, file_digest, images_of, messages_of, naming, refuse_videos, to_answer

Messages = tuple[dict[str, str], ...]
_QUESTION, _SYSTEM = "question", "system"
_ANSWERS = ("chosen", "rejected")
_PREPARED = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")


@dataclass(frozen=True)
class PairRow(Row):
    """A question, the better and the worse answer. Example: PairRow("a.jsonl, row 3", (message,), (), "", chosen="5", rejected="6")."""

    chosen: str | tuple[int, ...] = ""
    """Text, or token ids where the file holds them ready made."""
    rejected: str | tuple[int, ...] = ""


@dataclass(frozen=True)
class PairColumns(Columns[PairRow]):
    """A prompt and two answers."""

    prompt_key: str = "prompt"
    image_key: str = "images"

    @property
    def names(self) -> tuple[str, ...]:
        return self.prompt_key, _QUESTION, _SYSTEM, *_ANSWERS, self.image_key, "data_source", "videos"

    def check(self, subject: str, columns: Collection[str]) -> None:
        if missing := [name for name in _ANSWERS if name not in columns]:
            raise ValueError(
                f"{subject} has no column '{missing[0]}'; the columns are {', '.join(columns)}:"
                " a pair is prompt, chosen and rejected, or question, chosen and rejected"
            )

    def row(self, record: Mapping[str, Any], file: Path, number: int) -> PairRow:
        where = f"{file}, row {number}"
        with naming(where):
            refuse_videos(record)
            (said, chosen), (also_said, rejected) = (_answer(record.get(name), name) for name in _ANSWERS)
            return PairRow(
                where=where,
                messages=_prompt(self._stated(record), said, also_said),
                images=images_of(record.get(self.image_key), file.parent),
                answer="",
                data_source=record.get("data_source") or "",
                chosen=chosen,
                rejected=rejected,
            )

    def _stated(self, record: Mapping[str, Any]) -> Messages:
        """What the columns of the prompt say; () where there are none."""
        key = self.prompt_key if record.get(self.prompt_key) is not None else _QUESTION
        value, system = record.get(key), record.get(_SYSTEM) or ""
        if value is None:
            return ()
        if not isinstance(value, str):
            return messages_of(value, key)
        if not value.strip():
            raise BadRow(f"the prompt (column '{key}') is empty", "empty")
        if not isinstance(system, str):
            raise ValueError(f"column '{_SYSTEM}' must hold text, not {type(system).__name__}")
        asked = {"role": "user", "content": value}
        return ({"role": "system", "content": system}, asked) if system.strip() else (asked,)


def _prompt(stated: Messages, *said: Messages) -> Messages:
    """stated: by the prompt's column; said: by the conversations of the answers. Those that say anything must agree.

    A conversation may say more than the prompt: earlier turns, a system message.
    """
    conversations = [messages for messages in said if messages]
    if not stated and len(conversations) < len(said):
        raise BadRow("the prompt is missing: it has no column, and not both answers are whole conversations", "empty")
    messages = conversations[0] if conversations else stated
    if any(other != messages for other in conversations) or messages[len(messages) - len(stated) :] != stated:
        raise ValueError("the prompt, the conversation of chosen and the conversation of rejected differ before the answer")
    return to_answer(messages)


def _answer(value: Any, key: str) -> tuple[Messages, str]:
    """Messages before the answer, () where the column holds it alone, and its text."""
    if value is None or isinstance(value, str):
        return (), _said(value or "", key)
    *before, last = messages_of([value] if isinstance(value, dict) else value, key)
    if last["role"] != "assistant":
        raise ValueError(f"the last message of column '{key}' must be the assistant's, not the {last['role']}'s")
    return tuple(before), _said(last["content"], key)


def _said(text: str, key: str) -> str:
    if not text.strip():
        raise BadRow(f"the answer '{key}' is empty", "empty")
    return text


class IndexedPairs(Rows[PairRow]):
    """Pairs of the columns of a prefix: prompt and response in one sequence, and labels, which are -100 over the prompt.

    Raises ValueError at once for missing or damaged files, and for columns of other data.
    """

    def __init__(self, prefix: str | Path) -> None:
        self._prefix = Path(prefix)
        found = column_files(prefix)
        if missing := [name for name in _PREPARED if name not in found]:
            raise ValueError(
                f"{prefix} has the columns {', '.join(found)} but not {', '.join(missing)}; prepare pairs with AlpacaStylePairwiseHandler"
            )
        self._columns = open_columns(self._prefix, _PREPARED)
        self.files: tuple[Path, ...] = tuple(file for column in self._columns.values() for file in column.files)

    def __len__(self) -> int:
        return len(self._columns[_PREPARED[0]])

    def __getitem__(self, number: int) -> PairRow:
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        where = f"{column_name(self._prefix, '*')}, row {number}"
        with naming(where):
            (prompt, chosen), (other_prompt, rejected) = (self._parts(name, number) for name in _ANSWERS)
            if prompt != other_prompt:
                raise ValueError("chosen and rejected have different prompts")
            return PairRow(where, (), (), "", token_ids=prompt, chosen=chosen, rejected=rejected)

    def digests(self) -> dict[str, str]:
        return {file.name: file_digest(file) for file in self.files}

    def _parts(self, name: str, number: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Prompt and response of one of the two sequences."""
        token_ids, labels = (self._columns[f"{name}_{column}"][number] for column in ("input_ids", "labels"))
        trained = np.flatnonzero(labels >= 0)
        if not len(trained):
            raise BadRow(f"the answer '{name}' is empty: all of its labels are masked", "empty")
        start = int(trained[0])
        if len(labels) != len(token_ids) or not np.array_equal(labels[start:], token_ids[start:]):
            raise ValueError(f"{name}_labels must be masked over the prompt and equal {name}_input_ids behind it")
        if not start:
            raise BadRow("the prompt is empty: no label is masked", "empty")
        return tuple(token_ids[:start].tolist()), tuple(token_ids[start:].tolist())
