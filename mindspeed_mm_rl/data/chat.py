"""Messages to token ids by the chat template of a Hugging Face folder; one image token for each `<image>` marker."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mindspeed_mm_rl.data.rows import IMAGE_MARKER


def count_markers(messages: Sequence[Mapping[str, str]]) -> int:
    return sum(message["content"].count(IMAGE_MARKER) for message in messages)


def content_parts(messages: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Messages as chat templates of vision-language models read them: markers become image parts, in order.

    A message without markers keeps its plain text, which templates of text models ask for.
    Example: "<image>Find x." -> [{"type": "image"}, {"type": "text", "text": "Find x."}]
    """
    return [
        {"role": message["role"], "content": _parts(message["content"]) if IMAGE_MARKER in message["content"] else message["content"]}
        for message in messages
    ]


def _parts(text: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(text.split(IMAGE_MARKER)):
        if index:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


class ChatRenderer:
    """The tokenizer and chat template of one Hugging Face folder.

    Raises ValueError when the folder has no tokenizer, no chat template or no config.json.
    """

    def __init__(self, hf_path: str | Path, trust_remote_code: bool = False) -> None:
        self.folder = Path(hf_path).expanduser()
        file = self.folder / "config.json"
        if not file.is_file():
            raise ValueError(f"{self.folder} is no Hugging Face model folder: it has no config.json")
        config = json.loads(file.read_text(encoding="utf-8"))
        self.image_token_id: int | None = config.get("image_token_id")
        """None: the model reads text alone."""
        self._vocabulary: int | None = (config.get("text_config") or config).get("vocab_size")
        self.tokenizer = with_template(load_tokenizer(self.folder, trust_remote_code), self.folder)

    def token_ids(self, messages: Sequence[Mapping[str, str]], num_images: int) -> list[int]:
        """The prompt, the assistant's turn opened, one image token per image.

        Raises ValueError when markers, images and rendered image tokens differ in number.
        """
        if (markers := count_markers(messages)) != num_images:
            raise ValueError(f"the prompt has {markers} {IMAGE_MARKER} markers but the row has {num_images} images")
        if num_images and self.image_token_id is None:
            raise ValueError(f"the row has pictures, but the model in {self.folder} reads text alone (config.json: no image_token_id)")
        token_ids = self.tokenizer.encode(self._render(messages), add_special_tokens=False)
        found = 0 if self.image_token_id is None else token_ids.count(self.image_token_id)
        if found != num_images:
            raise ValueError(
                f"the chat template of {self.folder} gives {found} image tokens for {num_images} images:"
                " it must be the template of the vision-language model, and no prompt may spell the image token out"
            )
        self.check_known(token_ids)
        return token_ids

    def check_known(self, token_ids: Sequence[int]) -> None:
        """Raises ValueError for a token that was added to the tokenizer alone."""
        if self._vocabulary is not None and (largest := max(token_ids, default=0)) >= self._vocabulary:
            raise ValueError(
                f"token id {largest} ({self.tokenizer.convert_ids_to_tokens(largest)!r}), but the model in {self.folder} ends at "
                f"{self._vocabulary - 1} (config.json: vocab_size): take the token out, or give the model a row for it"
            )

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        try:
            return self.tokenizer.apply_chat_template(content_parts(messages), tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError) as error:
            raise ValueError(
                f"the chat template of {self.folder} can't render the prompt ({error});"
                " with pictures it must be the template of the vision-language model"
            ) from error


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Raises ValueError when the folder has no tokenizer; a chat template is not asked for."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # of a damaged tokenizer.json transformers may raise anything
        raise _unusable(folder, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    # Without its files transformers makes some tokenizers all the same, in which every text is no tokens at all.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise _unusable(folder, "it would have no words")
    # Older releases of vision-language models keep the template beside the tokenizer, where only their processor looks.
    beside = folder / "chat_template.json"
    if tokenizer.chat_template is None and beside.is_file():
        tokenizer.chat_template = json.loads(beside.read_text(encoding="utf-8"))["chat_template"]
    return tokenizer


def _unusable(folder: Path, reason: str) -> ValueError:
    return ValueError(f"{folder} has no usable tokenizer ({reason}): copy tokenizer.json and tokenizer_config.json of the model into it")


def with_template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """The same tokenizer; ValueError when it has no chat template."""
    if tokenizer.chat_template is None:
        raise ValueError(f"{folder} has no chat template: copy chat_template.jinja (or chat_template.json) of the model into it")
    return tokenizer
