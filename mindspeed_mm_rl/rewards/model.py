"""The process of a reward model: a Hugging Face sequence classifier with one label that reads prompt and response as a conversation.

pool thread                                 this process
   |  {"folder", "timeout"} ------------->   loads
   |  <-----------------------------------  {"ready"}, or {"problem"} and the end
   |  {"task", "messages", "responses"} -->
   |  <-----------------------------------  {"task", "scores"}, or {"task", "error"}
"""

from __future__ import annotations

import json
import signal
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_BATCH = 8
"""Responses of one forward pass. Never of two prompts: their scores must not depend on what else is graded just then."""
_ORPHAN_GRACE_SECONDS = 5.0
_TOLD_CHARACTERS = 4000


def check_folder(folder: str) -> None:
    """What can be seen without loading it. Raises ValueError with one sentence."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ValueError(f"rl_config.reward_model: {folder} holds no config.json; give the folder of a Hugging Face sequence classifier")
    config = json.loads((path / "config.json").read_text())
    architectures = config.get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        raise ValueError(
            f"rl_config.reward_model: {folder} is a {', '.join(architectures) or 'model of no architecture'}, not a sequence classifier: "
            "nothing in it gives a score"
        )
    labels = len(config.get("id2label") or (0, 1))
    if labels != 1:
        raise ValueError(f"rl_config.reward_model: {folder} tells {labels} labels apart; a reward is one number: num_labels must be 1")
    if not any(path.glob("*.safetensors")):
        raise ValueError(f"rl_config.reward_model: {folder} holds no *.safetensors; weights of other formats may run code, convert them")


class RewardModel:
    """Raises ValueError for a folder that lacks weights, tokenizer or chat template."""

    def __init__(self, folder: str) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from mindspeed_mm_rl.platforms import device

        check_folder(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not self.tokenizer.chat_template:
            raise ValueError(f"rl_config.reward_model: the tokenizer of {folder} has no chat template, so prompts can't be shown to it")
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
        if loading["missing_keys"]:
            raise ValueError(f"rl_config.reward_model: {folder} lacks the weights {', '.join(sorted(loading['missing_keys'])[:5])}")
        dtype = torch.float32 if device.kind() == "cpu" else torch.bfloat16
        self.model = model.to(device=device.current(), dtype=dtype).eval().requires_grad_(False)
        config = model.config.get_text_config()
        self._pad = config.pad_token_id
        self._limit = getattr(config, "max_position_embeddings", None)

    def score(self, messages: Sequence[dict[str, Any]], responses: Sequence[str]) -> list[float]:
        """One score per response; conversations that are too long lose their beginning."""
        rows = [self._token_ids([*messages, {"role": "assistant", "content": response}]) for response in responses]
        # A model without a padding token looks for the end of a row at its last place alone.
        size = _BATCH if self._pad is not None else 1
        return [score for start in range(0, len(rows), size) for score in self._forward(rows[start : start + size])]

    def _token_ids(self, conversation: list[dict[str, Any]]) -> list[int]:
        text = self.tokenizer.apply_chat_template(conversation, tokenize=False)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids[-self._limit :] if self._limit else ids

    def _forward(self, rows: list[list[int]]) -> list[float]:
        import torch

        length, pad = max(map(len, rows)), self._pad or 0
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows], device=self.model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=self.model.device)
        with torch.inference_mode():
            return self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()


def main(descriptor: int) -> None:
    # An interrupt of the terminal is for the driver, which then closes the pool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Connection(descriptor) as pipe:
        try:
            _serve(pipe)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # The driver is gone.


def _serve(pipe: Connection) -> None:
    order = json.loads(pipe.recv_bytes())
    try:
        model = RewardModel(order["folder"])
    except (ValueError, OSError) as problem:
        _send(pipe, {"problem": str(problem)})
        return
    _send(pipe, {"ready": True})
    while True:
        task = json.loads(pipe.recv_bytes())
        # The driver kills a process that is late. Should the driver be dead itself, the kernel does.
        signal.setitimer(signal.ITIMER_REAL, order["timeout"] + _ORPHAN_GRACE_SECONDS)
        try:
            answer: dict[str, object] = {"scores": model.score(task["messages"], task["responses"])}
        except Exception:
            answer = {"error": traceback.format_exc()[-_TOLD_CHARACTERS:]}
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        _send(pipe, {"task": task["task"], **answer})


def _send(pipe: Connection, message: dict[str, object]) -> None:
    pipe.send_bytes(json.dumps(message).encode())
