"""Tokenizers of the tiny models, learned from the few texts that their task consists of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END, PADDING = "<|im_end|>", "<|endoftext|>"
TURNS = (PADDING, "<|im_start|>", END)
"""The special tokens of every tiny model."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
AT_DIGITS = pre_tokenizers.Digits(individual_digits=True)
"""Merges cross word borders: what every text repeats becomes a handful of tokens."""
AS_QWEN2 = pre_tokenizers.Split(
    Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "isolated",
)
"""transformers reads every folder of the text models Qwen2 and Qwen2.5 with this split, whatever its tokenizer.json says."""


def learn_tokenizer(
    texts: Iterable[str], split: pre_tokenizers.PreTokenizer, marks: tuple[str, ...], special: Sequence[str], vocabulary: int
) -> PreTrainedTokenizerFast:
    """Byte-level BPE over what `split` leaves whole.

    Digits stay single tokens and the marks of the answer format are tokens of their own, so that numbers are all there is to learn.
    Ids that training leaves free become tokens of their own, so that each of `vocabulary` ids can be decoded.
    """
    tokenizer = Tokenizer(models.BPE())
    bytes_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_level])
    tokenizer.decoder = decoders.ByteLevel()
    pieces = [piece for text in texts for piece in split_at(text, marks)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(marks),
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in marks])
    tokenizer.add_tokens([f"<|unused_{i}|>" for i in range(vocabulary - tokenizer.get_vocab_size())])
    extra = [token for token in special if token != PADDING]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PADDING, additional_special_tokens=extra)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def split_at(text: str, marks: tuple[str, ...]) -> list[str]:
    """What the tokenizer sees between added tokens. Example: split_at("a<think>b", ("<think>",)) == ["a", "b"]."""
    for mark in marks:
        text = text.replace(mark, "\0")
    return [piece for piece in text.split("\0") if piece]
