"""What a sample becomes: the columns of token ids that each kind of training reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mindspeed_mm_rl.data.preprocess.samples import Sample
from mindspeed_mm_rl.data.preprocess.settings import nearest
from mindspeed_mm_rl.data.preprocess.templates import Encoder

IGNORED = -100
"""Labels of tokens that aren't trained on."""
LABELS = "labels"
Tokenize = Callable[[str], list[int]]
Ids = dict[str, list[int]]


@dataclass(frozen=True)
class Handler:
    """One kind of training data."""

    columns: tuple[str, ...]
    """Columns that are always written."""
    roles: tuple[str, ...]
    """Roles of map_keys that a sample can't do without."""
    encode: Callable[[Sample, Encoder, Tokenize], Ids]
    """Sample -> the ids of each column, without the additional ones."""
    pairwise: bool = False
    labels_are_answers: bool = False
    """dataset_additional_keys: [labels] writes the ids of the answer's text, and other keys those of their columns."""


def _prompt(sample: Sample, encoder: Encoder, tokenize: Tokenize) -> Ids:
    """Prompts for reinforcement learning: the answer is no part of them."""
    input_ids = encoder.prompt(sample.system, sample.history, sample.question)
    return {"input_ids": input_ids, "attention_mask": [1] * len(input_ids)} | {LABELS: tokenize(sample.responses[0])}


def _dialogue(sample: Sample, encoder: Encoder, tokenize: Tokenize) -> Ids:
    """Whole dialogues; every answer is trained on."""
    input_ids: list[int] = []
    labels: list[int] = []
    for source, answer in encoder.turns(sample.system, [*sample.history, (sample.question, sample.responses[0])]):
        masked = [IGNORED] * len(source)
        if encoder.eos_at_end and input_ids and masked:
            # The first token of a later turn is what the answer before it is followed by.
            masked[0] = _eos(encoder)
        input_ids += source + answer
        labels += masked + answer
    if encoder.eos_at_end:
        input_ids.append(_eos(encoder))
        labels.append(_eos(encoder))
    return {"input_ids": input_ids, "attention_mask": [1] * len(input_ids), LABELS: labels}


def _pair(sample: Sample, encoder: Encoder, tokenize: Tokenize) -> Ids:
    """Preference pairs: the same prompt before both responses, of which only the response is trained on."""
    columns: Ids = {}
    for name, response in zip(("chosen", "rejected"), sample.responses, strict=True):
        *earlier, (source, answer) = encoder.turns(sample.system, [*sample.history, (sample.question, response)])
        prompt = [token for turn in earlier for part in turn for token in part] + source
        answer = [*answer, _eos(encoder)] if encoder.eos_at_end else answer
        columns[f"{name}_input_ids"] = prompt + answer
        columns[f"{name}_labels"] = [IGNORED] * len(prompt) + answer
    return columns


def _eos(encoder: Encoder) -> int:
    if encoder.eos_id is None:
        raise ValueError("the template ends a dialogue with the end of sequence, and the tokenizer has no such token")
    return encoder.eos_id


def with_eod(ids: Ids, encoder: Encoder) -> Ids:
    """append_eod: one more end of sequence behind a dialogue, trained on."""
    return {name: [*values, 1 if name == "attention_mask" else _eos(encoder)] for name, values in ids.items()}


_PROMPTS = Handler(("input_ids", "attention_mask"), ("prompt", "response"), _prompt, labels_are_answers=True)
HANDLERS = {
    "R1AlpacaStyleInstructionHandler": _PROMPTS,
    "Math17kAlpacaStyleInstructionHandler": _PROMPTS,
    "AlpacaStyleInstructionHandler": Handler(("input_ids", "attention_mask", LABELS), ("prompt", "response"), _dialogue),
    "AlpacaStylePairwiseHandler": Handler(
        ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels"),
        ("prompt", "chosen", "rejected"),
        _pair,
        pairwise=True,
    ),
}
_NOT_OFFERED = {"AlpacaStyleProcessRewardHandler": "models of process rewards aren't trained here"}


def find_handler(name: str, additional: Sequence[str], append_eod: bool) -> Handler:
    """Raises ValueError that names the valid ones, or keys that this handler doesn't know."""
    if name in _NOT_OFFERED:
        raise ValueError(f"handler_name: {name} isn't offered; {_NOT_OFFERED[name]}")
    if name not in HANDLERS:
        hint = f"did you mean {nearest(name, HANDLERS)}?" if name else f"choose {', '.join(HANDLERS)}"
        raise ValueError(f"handler_name: there is no handler '{name}'; {hint}")
    handler = HANDLERS[name]
    if additional and not handler.labels_are_answers:
        raise ValueError(f"dataset_additional_keys: {name} writes {', '.join(handler.columns)} and nothing else; leave the key out")
    if append_eod and handler.encode is not _dialogue:
        raise ValueError(f"append_eod is for AlpacaStyleInstructionHandler alone; {name} ends nothing with an end of document")
    return handler
