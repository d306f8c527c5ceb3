"""The keys of a preparation's YAML file: those that act, with their defaults, those that nothing depends on, those that aren't offered."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError

from mindspeed_mm_rl.config.known_keys import NotOffered
from mindspeed_mm_rl.config.schema import Section

CHAT_TEMPLATE = "chat_template"


class MapKeys(Section):
    """Columns of the data set by role; "" or null: the data set has none."""

    prompt: str | None = "instruction"
    """The question: a text, or for Math17k a list of {role, content} messages."""
    query: str | None = "input"
    """Text appended to the prompt on a line of its own."""
    response: str | None = "output"
    """The answer; for Math17k a text or {ground_truth}."""
    history: str | None = None
    """Earlier turns as [[question, answer], ...]."""
    system: str | None = None
    """The system message."""
    chosen: str | None = "chosen"
    """The better response of a pair."""
    rejected: str | None = "rejected"
    """The worse response of a pair."""


class Settings(Section):
    """All keys that act."""

    input: str
    """File (.json, .jsonl, .parquet) or folder of such files; with merge_group_keys, folder of prepared columns."""
    output_prefix: str
    """The files are <output_prefix>_packed_<column>_document.bin and .idx; missing folders are made."""
    handler_name: str = ""
    """What a sample becomes: prompts and answers, dialogues, or preference pairs."""
    tokenizer_name_or_path: str | None = None
    """Hugging Face folder with the tokenizer."""
    prompt_type: str = "empty"
    """Name of a prompt template, or chat_template for the tokenizer's own."""
    prompt_type_path: str | None = None
    """JSON file with more templates; they go before those that come along."""
    enable_thinking: bool | None = None
    """For templates of reasoning models. true: the model thinks before it answers; false: the thought is closed at once; null: false
    for a named template, the tokenizer's own default for chat_template."""
    map_keys: MapKeys = MapKeys()
    """Which column is what."""
    dataset_additional_keys: tuple[str, ...] = ()
    """More columns to write: labels is the answer, others are columns of the data set, as text."""
    seq_length: int | None = Field(None, gt=0)
    """Samples with a column of this many tokens or more are dropped; null = none."""
    append_eod: bool = False
    """true: dialogues end with one more end-of-sequence token."""
    workers: int = Field(1, gt=0)
    """Processes that tokenize; not more than cores. The order never depends on it."""
    log_interval: int = Field(100, gt=0)
    """Samples between two progress lines, where there is no terminal for a progress bar."""
    merge_group_keys: tuple[str, ...] | None = None
    """Instead of preparing: join the columns in `input` whose names hold a key, into <output_prefix>_<key>."""


DERIVED = {
    reason: frozenset(keys.split())
    for reason, keys in {
        "the data set is streamed, nothing is cached": "streaming cache_dir overwrite_cache n_subs",
        "nothing is drawn at random": "seed",
        "the tokenizer of tokenizer_name_or_path is used as it is": "tokenizer_not_use_fast make_vocab_size_divisible_by pad_vocab_size_to",
        "the handler decides which columns are written": "json_keys",
        "only process rewards have step tokens": "placeholder_token",
    }.items()
}
_PRETRAINING = "it is for pretraining; this prepares prompts, dialogues and pairs"
NOT_OFFERED = {
    "tokenizer_type": NotOffered(("HuggingFaceTokenizer", "PretrainedFromHF"), "give a Hugging Face folder in tokenizer_name_or_path"),
    "vocab_file": NotOffered((), "give a Hugging Face folder in tokenizer_name_or_path"),
    "merge_file": NotOffered((), "give a Hugging Face folder in tokenizer_name_or_path"),
    "pack": NotOffered((False,), "leave samples apart: training packs them itself, without padding"),
    "neat_pack": NotOffered((False,), "leave samples apart: training packs them itself, without padding"),
    "split_sentences": NotOffered((False,), _PRETRAINING),
    "keep_newlines": NotOffered((False,), _PRETRAINING),
    "interleave_probs": NotOffered((), "prepare one data set at a time, or join prepared columns with merge_group_keys"),
    "reward_tokens": NotOffered(([],), "models of process rewards aren't trained here"),
    "script_data_dir": NotOffered((), "code of data sets isn't run; give json, jsonl or parquet files in input"),
    "dataset_impl": NotOffered(("mmap",), "leave it out"),
}


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Settings, tuple[str, ...]]:
    """The settings, and one note per reason for keys that nothing depends on. Raises ValueError with one sentence."""
    tree = _read(Path(path).expanduser(), overrides)
    notes = [f"{', '.join(sorted(keys & tree.keys()))}: {reason}" for reason, keys in DERIVED.items() if keys & tree.keys()]
    for key, rule in NOT_OFFERED.items():
        value = tree.get(key)
        if value is not None and value not in rule.neutral:
            raise ValueError(f"{key}: {value} isn't offered; {rule.instead}")
    known = [*Settings.model_fields, *NOT_OFFERED, *(key for keys in DERIVED.values() for key in keys)]
    for key in tree:
        _known(key, known)
    # null means the default, as in the other YAML files.
    acting = {key: value for key, value in tree.items() if key in Settings.model_fields and value is not None}
    if isinstance(acting.get("map_keys"), dict):
        acting["map_keys"] = {key: value or None for key, value in acting["map_keys"].items() if not _known(key, MapKeys.model_fields)}
    try:
        return Settings.model_validate(acting), tuple(notes)
    except ValidationError as error:
        raise ValueError(_sentence(error)) from error


def _known(key: str, known: Iterable[str]) -> None:
    if key not in known:
        raise ValueError(f"unknown key {key}; did you mean {nearest(key, known)}?")


def nearest(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(name, list(known), 1, cutoff=0.0)[0]


def _read(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"configuration file {path} doesn't exist")
    try:
        tree = OmegaConf.load(path)
        for override in overrides:
            if not re.match(r"\+*[\w.-]+=", override):
                raise ValueError(f"'{override}' isn't an override: write key=value, for example seq_length=2048")
            tree.merge_with_dotlist([override.lstrip("+")])
        content = OmegaConf.to_container(tree, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, AssertionError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold lines such as input: FILE, not a {type(content).__name__}")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _sentence(error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "missing":
        return f"{key} is missing: {' '.join((Settings.model_fields[key].description or '').split())}"
    return f"{key}: {problem['input']!r} isn't allowed; {str(problem['msg']).replace('Input should be', 'it must be')}"
