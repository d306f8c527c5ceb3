"""A row as every kind of file gives it: rows of verl (`prompt, images, reward_model, extra_info`) and of TRL (`prompt, answer`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

IMAGE_MARKER = "<image>"
"""Stands in a prompt's text where a picture goes."""

ANSWER_PLACES = ("extra_info.answer", "reward_model.ground_truth", "answer")


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


class Rows(Protocol):
    """Rows by number, from 0; safe to index from several threads."""

    files: tuple[Path, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Row:
        """Raises ValueError that names file and row when the row lacks what a prompt needs."""

    def digests(self) -> dict[str, str]:
        """File name -> sha256 of its bytes."""


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Puts the place in front of the ValueErrors of what cannot know it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def file_digest(path: Path) -> str:
    """sha256 of the file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def row_of(record: Mapping[str, Any], file: Path, number: int, prompt_key: str, image_key: str) -> Row:
    """Raises ValueError that names file and row when the record lacks what a prompt needs."""
    where = f"{file}, row {number}"
    with naming(where):
        if record.get("videos"):
            raise ValueError("column 'videos' is not empty, and videos are not offered: use pictures")
        return Row(
            where=where,
            messages=_messages(record.get(prompt_key), prompt_key, plain="answer" in record),
            images=_images(record.get(image_key), file.parent),
            answer=_answer(record),
            data_source=record.get("data_source") or "",
            extra=dict(_struct(record, "extra_info")),
        )


def _messages(value: Any, key: str, plain: bool) -> tuple[dict[str, str], ...]:
    """plain: a text stands for one message of the user, as in rows of TRL."""
    if plain and isinstance(value, str) and value.strip():
        return ({"role": "user", "content": value},)
    if not isinstance(value, list) or not value:
        raise ValueError(f"column '{key}' must be a list of {{role, content}} messages, not {value!r}")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise ValueError(f"a message of column '{key}' lacks the text of role or content: {message!r}")
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _images(value: Any, folder: Path) -> tuple[bytes, ...]:
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
        raise ValueError(f"image file {path} does not exist")
    raise ValueError("an image has neither bytes nor a path")


def _answer(record: Mapping[str, Any]) -> str:
    candidates = _struct(record, "extra_info").get("answer"), _struct(record, "reward_model").get("ground_truth"), record.get("answer")
    for candidate in candidates:
        if candidate is not None and str(candidate).strip():
            return json.dumps(candidate, ensure_ascii=False) if isinstance(candidate, dict | list) else str(candidate)
    raise ValueError(f"the answer is missing ({', '.join(ANSWER_PLACES)} are all empty)")


def _struct(record: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    """A column of named fields; one of another kind (a number, a text) has none."""
    value = record.get(column)
    return value if isinstance(value, dict) else {}
