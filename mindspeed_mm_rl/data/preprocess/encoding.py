"""Records to columns of token ids, in this process or in several; the order is always that of the data set."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path

from mindspeed_mm_rl.data.chat import load_tokenizer, with_template
from mindspeed_mm_rl.data.preprocess.handlers import LABELS, Ids, find_handler, with_eod
from mindspeed_mm_rl.data.preprocess.records import Record
from mindspeed_mm_rl.data.preprocess.samples import Columns, Dropped, sample_of
from mindspeed_mm_rl.data.preprocess.settings import CHAT_TEMPLATE, Settings, nearest
from mindspeed_mm_rl.data.preprocess.template_table import TEMPLATES
from mindspeed_mm_rl.data.preprocess.templates import ChatTemplateEncoder, Encoder, Template, TemplateEncoder, read_templates
from mindspeed_mm_rl.data.rows import naming

_CHUNK = 64
_CHUNKS_AHEAD = 4
"""Chunks per process that are read before they are asked for."""

_FEW = 16384
"""Fewer records are done by one process before others would have started."""

Placed = tuple[str, Record]


@dataclass(frozen=True)
class Outcome:
    """What one record became. Example: Outcome({"input_ids": [1, 2], "labels": [3]}) or Outcome({}, "no response")."""

    ids: Ids
    dropped: str = ""
    """Why there are no ids; "" for a sample that is kept."""
    changed: str = ""
    """The place of a kept sample whose answer reads back as another text."""


class Preparer:
    """Raises ValueError when it is made for a tokenizer, template or handler that can't be used."""

    def __init__(self, settings: Settings, columns: Columns) -> None:
        self._columns, self._longest = columns, settings.seq_length
        self._handler = find_handler(settings.handler_name, settings.dataset_additional_keys, settings.append_eod)
        self._names = column_names(settings)
        self._append_eod = settings.append_eod
        self._tokenizer = tokenizer_of(_folder(settings))
        self._encoder = self._make_encoder(settings)

    def prepare(self, where: str, record: Record) -> Outcome:
        """Raises ValueError that names file and row for a record of the wrong kind."""
        try:
            sample = sample_of(record, where, self._columns, self._handler.pairwise)
        except Dropped as reason:
            return Outcome({}, str(reason))
        with naming(where):
            ids = self._handler.encode(sample, self._encoder, self._tokenize)
        ids |= {name: self._tokenize(text) for name, text in sample.additional.items()}
        if self._append_eod:
            ids = with_eod(ids, self._encoder)
        ids = {name: ids[name] for name in self._names}
        if self._longest is not None and max(map(len, ids.values())) >= self._longest:
            return Outcome({}, f"at least {self._longest} tokens (seq_length)")
        return Outcome(ids, changed=where if self._reads_otherwise(ids, sample.responses[0]) else "")

    def _reads_otherwise(self, ids: Ids, answer: str) -> bool:
        answers = self._handler.labels_are_answers and LABELS in ids
        return answers and self._tokenizer.decode(ids[LABELS], clean_up_tokenization_spaces=False) != answer

    def _tokenize(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _make_encoder(self, settings: Settings) -> Encoder:
        name, thinking = settings.prompt_type, settings.enable_thinking
        if name == CHAT_TEMPLATE:
            return ChatTemplateEncoder(with_template(self._tokenizer, _folder(settings)), thinking)
        template = find_template(name, settings.prompt_type_path)
        if thinking and not template.reasoning:
            raise ValueError(f"enable_thinking: prompt_type {name} knows no thoughts; use qwen3 or {CHAT_TEMPLATE}, or leave the key out")
        return TemplateEncoder(template, name, self._tokenizer, bool(thinking))


def find_template(name: str, path: str | None) -> Template:
    """Raises ValueError that names the nearest template."""
    templates = TEMPLATES | (read_templates(Path(path).expanduser()) if path else {})
    if name not in templates:
        raise ValueError(f"prompt_type: there is no template '{name}'; did you mean {nearest(name, [*templates, CHAT_TEMPLATE])}?")
    return templates[name]


def column_names(settings: Settings) -> tuple[str, ...]:
    """The columns that are written, in order."""
    handler = find_handler(settings.handler_name, settings.dataset_additional_keys, settings.append_eod)
    return tuple(dict.fromkeys((*handler.columns, *settings.dataset_additional_keys)))


def outcomes(records: Iterable[Placed], settings: Settings, columns: Columns) -> Iterator[Outcome]:
    """One for each record, in order. Errors of a worker process are raised here."""
    source = iter(records)
    head = list(islice(source, _FEW))
    workers = min(settings.workers, os.cpu_count() or 1) if len(head) == _FEW else 1
    source = chain(head, source)
    chunks = iter(lambda: list(islice(source, _CHUNK)), [])
    if workers == 1:
        for chunk in chunks:
            yield from _prepare_chunk(settings, columns, chunk)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        pending: deque[Future[list[Outcome]]] = deque()
        try:
            for chunk in chunks:
                pending.append(pool.submit(_prepare_chunk, settings, columns, chunk))
                if len(pending) >= _CHUNKS_AHEAD * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _prepare_chunk(settings: Settings, columns: Columns, chunk: list[Placed]) -> list[Outcome]:
    prepare = preparer(settings, columns).prepare
    return [prepare(where, record) for where, record in chunk]


@lru_cache(maxsize=1)
def preparer(settings: Settings, columns: Columns) -> Preparer:
    """One per process."""
    return Preparer(settings, columns)


# A tokenizer takes a second or more to load.
tokenizer_of = lru_cache(maxsize=1)(load_tokenizer)


def _folder(settings: Settings) -> Path:
    if not settings.tokenizer_name_or_path:
        raise ValueError("tokenizer_name_or_path is missing: give a Hugging Face folder with the tokenizer")
    folder = Path(settings.tokenizer_name_or_path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"tokenizer_name_or_path: {folder} is not a folder; give a Hugging Face folder")
    return folder
