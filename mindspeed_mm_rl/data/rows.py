"""A row as every kind of file gives it: rows of verl (`prompt, images, reward_model, extra_info`) and of TRL (`prompt, answer`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

IMAGE_MARKER = "<image>"
"""Stands in a prompt's text where a picture goes."""

ANSWER_PLACES = ("reward_model.ground_truth", "extra_info.answer", "answer")
"""The first that is there. extra_info.answer may be a whole worked solution, as in verl's rows of GSM8K."""


@dataclass(frozen=True)
class Row:
    """One question as the file holds it.

    Example: Row("train.parquet, row 3", ({"role": "user", "content": "<image>Find x."},), (png,), "5")
    """

    where: str
    """File and row number (from 0), for messages to people."""
    messages: tuple[dict[str, str], ...]
    images: tuple[bytes, ...]
    """Encoded pictures (PNG, JPEG, ...), in the order of their markers."""
    answer: str
    data_source: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    """extra_info of the row."""
    token_ids: tuple[int, ...] | None = None
    """The prompt where the file holds it ready made, then there are no messages; None: the chat template renders the messages."""


RowT = TypeVar("RowT", bound=Row)
AnyRow = TypeVar("AnyRow", bound=Row, covariant=True)


class Rows(Protocol[AnyRow]):
    """Rows by number, from 0; safe to index from several threads."""

    files: tuple[Path, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> AnyRow:
        """Raises ValueError that names file and row when the row lacks what it is drawn for."""

    def digests(self) -> dict[str, str]:
        """File name -> sha256 of its bytes."""


class RowRange(Rows[RowT]):
    """Some of the rows, numbered from 0; messages still name the row's number in its file.

    Example: RowRange(rows, (-50, None)) is the last 50. Raises ValueError when no row is left.
    """

    def __init__(self, rows: Rows[RowT], bounds: tuple[int | None, int | None]) -> None:
        self._rows, self._numbers = rows, range(len(rows))[slice(*bounds)]
        self.files = rows.files
        if not self._numbers:
            raise ValueError(f"{rows.files[0]} has {len(rows)} rows, which is too few to hold some of them out: none is left")

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: int) -> RowT:
        return self._rows[self._numbers[number]]

    def digests(self) -> dict[str, str]:
        return self._rows.digests()


class Columns(Protocol[AnyRow]):
    """The columns of a file that a row is made of, and how."""

    prompt_key: str
    image_key: str

    @property
    def names(self) -> tuple[str, ...]:
        """All that are looked at: others needn't be read."""

    def check(self, subject: str, columns: Collection[str]) -> None:
        """subject: what has these columns. Raises ValueError when no row of it could be drawn."""

    def row(self, record: Mapping[str, Any], file: Path, number: int) -> AnyRow:
        """Raises ValueError that names file and row when the record lacks what the row needs."""


class BadRow(ValueError):
    """A row that can't be drawn for a reason that is counted by itself."""

    def __init__(self, message: str, rule: str) -> None:
        super().__init__(message)
        self.rule = rule


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Puts the place in front of the ValueErrors of what cannot know it."""
    try:
        yield
    except BadRow as error:
        raise BadRow(f"{where}: {error}", error.rule) from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def file_digest(path: Path) -> str:
    """sha256 of the file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class PromptColumns(Columns[Row]):
    """A prompt and its answer."""

    prompt_key: str = "prompt"
    image_key: str = "images"

    @property
    def names(self) -> tuple[str, ...]:
        return self.prompt_key, self.image_key, "extra_info", "reward_model", "answer", "data_source", "videos"

    def check(self, subject: str, columns: Collection[str]) -> None:
        if self.prompt_key not in columns:
            raise ValueError(
                f"{subject} has no column '{self.prompt_key}'; the columns are {', '.join(columns)}:"
                " raw data sets are made into training rows by the scripts of examples/rl/data_preprocess"
            )
        if not any(place.partition(".")[0] in columns for place in ANSWER_PLACES):
            raise ValueError(f"{subject} has neither {' nor '.join(ANSWER_PLACES)}: nothing could be graded")

    def row(self, record: Mapping[str, Any], file: Path, number: int) -> Row:
        where = f"{file}, row {number}"
        with naming(where):
            refuse_videos(record)
            return Row(
                where=where,
                messages=to_answer(_messages(record.get(self.prompt_key), self.prompt_key, plain="answer" in record)),
                images=images_of(record.get(self.image_key), file.parent),
                answer=_answer(record),
                data_source=record.get("data_source") or "",
                extra=dict(_struct(record, "extra_info")),
            )


def refuse_videos(record: Mapping[str, Any]) -> None:
    if record.get("videos"):
        raise ValueError("column 'videos' is not empty, and videos are not offered: use pictures")


def _messages(value: Any, key: str, plain: bool) -> tuple[dict[str, str], ...]:
    """plain: a text stands for one message of the user, as in rows of TRL."""
    if plain and isinstance(value, str) and value.strip():
        return ({"role": "user", "content": value},)
    return messages_of(value, key)


def messages_of(value: Any, key: str) -> tuple[dict[str, str], ...]:
    """A list of messages; what isn't one raises ValueError that names the column `key`."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"column '{key}' must be a list of {{role, content}} messages, not {value!r}")
    return tuple(_message(message, key) for message in value)


def to_answer(messages: tuple[dict[str, str], ...]) -> tuple[dict[str, str], ...]:
    """The same messages; ValueError where they hold the answer, which chat templates would show before they ask for another one."""
    if messages[-1]["role"] == "assistant":
        raise ValueError("the assistant has the last word of the prompt: nothing is left to answer")
    return messages


def _message(message: Any, key: str) -> dict[str, str]:
    content = _joined(message.get("content")) if isinstance(message, dict) else None
    if content is None or not isinstance(message.get("role"), str):
        raise ValueError(f"a message of column '{key}' lacks the text of role or content: {message!r}")
    return {"role": message["role"], "content": content}


def _joined(content: Any) -> str | None:
    """The text of a content; of one in parts, with a marker for every picture. None: it has another form.

    Example: _joined([{"type": "image"}, {"type": "text", "text": "Find x."}]) == "<image>Find x."
    """
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    if not all(isinstance(part, dict) and (part.get("type") == "image" or isinstance(part.get("text"), str)) for part in content):
        return None
    return "".join(IMAGE_MARKER if part.get("type") == "image" else part["text"] for part in content)


def images_of(value: Any, folder: Path) -> tuple[bytes, ...]:
    """Encoded pictures of a column's value, in order. folder: where relative paths begin. Raises ValueError for what is none."""
    images = value if isinstance(value, list) else [value] if value else []
    return tuple(_image_bytes({"path": image} if isinstance(image, str) else image, folder) for image in images)


def _image_bytes(image: Any, folder: Path) -> bytes:
    if image and not isinstance(image, dict):
        raise ValueError(f"an image must be {{bytes, path}} or a path, not {type(image).__name__}")
    if image and isinstance(image.get("bytes"), bytes) and image["bytes"]:
        return image["bytes"]
    if image and image.get("path"):
        path = folder / Path(image["path"]).expanduser()
        if path.is_file():
            return path.read_bytes()
        raise BadRow(f"image file {path} does not exist", "missing_image")
    raise BadRow("an image has neither bytes nor a path", "missing_image")


def _answer(record: Mapping[str, Any]) -> str:
    candidates = _struct(record, "reward_model").get("ground_truth"), _struct(record, "extra_info").get("answer"), record.get("answer")
    for candidate in candidates:
        if candidate is not None and str(candidate).strip():
            return json.dumps(candidate, ensure_ascii=False) if isinstance(candidate, dict | list) else str(candidate)
    raise ValueError(f"the answer is missing ({', '.join(ANSWER_PLACES)} are all empty)")


def _struct(record: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    """A column of named fields; one of another kind (a number, a text) has none."""
    value = record.get(column)
    return value if isinstance(value, dict) else {}
