"""Prompt templates: a dialogue to token ids, turn by turn, by a named template or by the tokenizer's own chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Turn = tuple[str, str]
"""What the user says and what the assistant answers."""
EncodedTurn = tuple[list[int], list[int]]

_OPEN, _CLOSE = "<think>", "</think>"
_EMPTY_THOUGHT = f"{_OPEN}\n\n{_CLOSE}\n\n"
_THOUGHT = re.compile(f"{_OPEN}.*?{_CLOSE}", re.DOTALL)


@dataclass(frozen=True)
class Token:
    """A token by name: bos_token, eos_token or its text. Example: Token("<|im_end|>")."""

    name: str


BOS, EOS = Token("bos_token"), Token("eos_token")
Slot = str | Token
"""Text with {{content}} and {{idx}} (number of the turn) to fill in, or a token."""


@dataclass(frozen=True)
class Template:
    """How a family of models writes a dialogue: prefix, system, then user and assistant, a separator before every later turn.

    Example: Template(user=("Human: {{content}}\\nAssistant:",), separator=("\\n",))
    """

    user: tuple[Slot, ...] = ("{{content}}",)
    assistant: tuple[Slot, ...] = ("{{content}}", EOS)
    system: tuple[Slot, ...] = ("{{content}}",)
    separator: tuple[Slot, ...] = ()
    prefix: tuple[Slot, ...] = ()
    default_system: str = ""
    """Used where the sample has no system message; "" = none."""
    stop_word: str = ""
    """The token that ends a turn in place of the tokenizer's end of sequence; "" = that one."""
    eos_at_end: bool = False
    """The end of sequence stands once behind the whole dialogue, not behind every answer."""
    reasoning: bool = False
    """Answers begin with a <think> part, an empty one if need be; answers of earlier turns have none."""
    system_in_user: bool = False
    """The system message stands inside the first user message."""


class Encoder(Protocol):
    """Dialogues to token ids."""

    eos_id: int | None
    """What ends a turn; None: the tokenizer has no such token."""
    eos_at_end: bool

    def prompt(self, system: str, history: Sequence[Turn], question: str) -> list[int]:
        """The ids of everything up to the answer that the model is to give."""

    def turns(self, system: str, turns: Sequence[Turn]) -> list[EncodedTurn]:
        """Per turn, the ids before the answer and the ids of the answer."""


class TemplateEncoder:
    """A named template. Raises ValueError when the tokenizer lacks the token that ends its turns."""

    def __init__(self, template: Template, name: str, tokenizer: PreTrainedTokenizerBase, enable_thinking: bool) -> None:
        self._template, self._tokenizer, self._thinking = template, tokenizer, enable_thinking
        self.eos_at_end = template.eos_at_end
        self.eos_id: int | None = tokenizer.eos_token_id
        if template.stop_word:
            ids = tokenizer.encode(template.stop_word, add_special_tokens=False)
            if len(ids) != 1:
                raise ValueError(
                    f"prompt_type {name} ends turns with {template.stop_word}, which is no token of {tokenizer.name_or_path};"
                    " choose the template of this model, or chat_template"
                )
            self.eos_id = ids[0]

    def prompt(self, system: str, history: Sequence[Turn], question: str) -> list[int]:
        turns = self.turns(system, [*history, (question, "")])
        earlier = [token for source, answer in turns[:-1] for token in (*source, *answer)]
        return earlier + turns[-1][0]

    def turns(self, system: str, turns: Sequence[Turn]) -> list[EncodedTurn]:
        encoded = []
        for number, (question, answer) in enumerate(turns):
            if self._template.reasoning and (number < len(turns) - 1 or not self._thinking):
                answer = _THOUGHT.sub("", answer).lstrip("\n")
            source = self._ids([*self._opening(system, number), *self._user(system, question, number)])
            encoded.append((source, self._ids(_filled(self._template.assistant, answer, number))))
        if self._template.reasoning and not (_OPEN in answer or _CLOSE in answer):
            encoded[-1] = self._with_empty_thought(*encoded[-1])
        return encoded

    def _opening(self, system: str, number: int) -> Sequence[Slot]:
        if number:
            return self._template.separator
        system = system or self._template.default_system
        inside = self._template.system_in_user or not system
        return [*self._template.prefix, *([] if inside else _filled(self._template.system, system, number))]

    def _user(self, system: str, question: str, number: int) -> list[Slot]:
        system = system or self._template.default_system
        if self._template.system_in_user and system and not number:
            question = "".join(slot for slot in _filled(self._template.system, system, number) if isinstance(slot, str)) + question
        return _filled(self._template.user, question, number)

    def _with_empty_thought(self, source: list[int], answer: list[int]) -> EncodedTurn:
        """A model that thinks writes the thought itself; for one that doesn't it is part of the prompt."""
        thought = self._tokenizer.encode(_EMPTY_THOUGHT, add_special_tokens=False)
        return (source, thought + answer) if self._thinking else (source + thought, answer)

    def _ids(self, slots: Sequence[Slot]) -> list[int]:
        """Slot by slot: a token never reaches over the border of two slots."""
        return [token for slot in slots for token in (self._token(slot) if isinstance(slot, Token) else self._text(slot))]

    def _text(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False) if text else []

    def _token(self, token: Token) -> list[int]:
        ids = {BOS: self._tokenizer.bos_token_id, EOS: self.eos_id}
        number = ids[token] if token in ids else self._tokenizer.convert_tokens_to_ids(token.name)
        return [] if number is None else [number]


class ChatTemplateEncoder:
    """The tokenizer's own chat template. enable_thinking is given to it, None leaves its default."""

    eos_at_end = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, enable_thinking: bool | None) -> None:
        self._tokenizer = tokenizer
        self._options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self.eos_id: int | None = tokenizer.eos_token_id

    def prompt(self, system: str, history: Sequence[Turn], question: str) -> list[int]:
        return self._ids(self._render(system, history, question))

    def turns(self, system: str, turns: Sequence[Turn]) -> list[EncodedTurn]:
        """Raises ValueError when the template writes a dialogue differently once it goes on: then its turns can't be told apart."""
        encoded, before = [], ""
        for number, (question, _) in enumerate(turns):
            opened = self._render(system, turns[:number], question)
            closed = self._render(system, turns[: number + 1], None)
            if not (opened.startswith(before) and closed.startswith(opened)):
                raise ValueError("prompt_type chat_template: this one rewrites earlier text of a dialogue; choose a named template")
            encoded.append((self._ids(opened[len(before) :]), self._ids(closed[len(opened) :])))
            before = closed
        return encoded

    def _render(self, system: str, turns: Sequence[Turn], question: str | None) -> str:
        messages = [{"role": "system", "content": system}] if system else []
        for said, answer in turns:
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
        if question is not None:
            messages.append({"role": "user", "content": question})
        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=question is not None, **self._options
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the tokenizer's chat template can't render the sample ({error})") from error

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def _filled(slots: Sequence[Slot], content: str, number: int) -> list[Slot]:
    # {{idx}} first, so that content which spells it out stays as it is.
    return [slot if isinstance(slot, Token) else slot.replace("{{idx}}", str(number)).replace("{{content}}", content, 1) for slot in slots]


def read_templates(path: Path) -> dict[str, Template]:
    """A user's JSON file: [{name, format_user: {slots: [...]}, format_system, ..., default_system, stop_words, ...}].

    Raises ValueError that names the file and the template.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"prompt_type_path: {path} can't be read as JSON ({error})") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in entries):
        raise ValueError(f"prompt_type_path: {path} must be a list of templates, each with a name")
    return {entry["name"]: _template(entry, f"prompt_type_path: {path}, template {entry['name']}") for entry in entries}


def _template(entry: Mapping[str, Any], where: str) -> Template:
    parts = {}
    for name in ("user", "assistant", "system", "separator", "prefix"):
        if content := entry.get(f"format_{name}"):
            if not isinstance(content, dict) or not isinstance(content.get("slots"), list):
                raise ValueError(f"{where}: format_{name} must be {{slots: [...]}}, not {content!r}")
            parts[name] = tuple(_slot(slot, f"{where}: format_{name}") for slot in content["slots"])
    at_end, words, system = bool(entry.get("efficient_eos")), entry.get("stop_words") or [], entry.get("default_system") or ""
    if at_end:
        parts.setdefault("assistant", ("{{content}}",))
    return Template(
        **parts,
        default_system="".join(system),
        stop_word=words[0] if words and entry.get("replace_eos") else "",
        eos_at_end=at_end,
        reasoning=entry.get("template_class") == "ReasoningTemplate",
        system_in_user=str(entry["name"]).startswith("llama2"),
    )


def _slot(slot: Any, where: str) -> Slot:
    if isinstance(slot, str):
        return slot
    if isinstance(slot, list) and slot in (["bos_token"], ["eos_token"]):
        return Token(slot[0])
    if isinstance(slot, dict) and isinstance(slot.get("token"), str):
        return Token(slot["token"])
    raise ValueError(f'{where}: a slot is text, ["bos_token"], ["eos_token"] or {{"token": ...}}, not {slot!r}')
