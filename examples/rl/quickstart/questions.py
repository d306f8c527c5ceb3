"""Rows of geo3k.py as model inputs: the prompt exactly as the trainer renders it, and the picture.

Import it before transformers' models or vllm: the package that it imports makes torchvision importable beside a CPU torch.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from mindspeed_mm_rl.data.chat import ChatRenderer


@dataclass(frozen=True)
class Question:
    """Example: Question(content="<image>Find x. You FIRST think ...", image=<84 x 84>, answer=55)."""

    content: str
    image: Image.Image
    answer: int


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    rows = pq.read_table(path, columns=["prompt", "images", "extra_info"]).slice(0, limit).to_pylist()
    return [
        Question(
            content=row["prompt"][0]["content"],
            image=Image.open(io.BytesIO(row["images"][0]["bytes"])).convert("RGB"),
            answer=int(row["extra_info"]["answer"]),
        )
        for row in rows
    ]


def prompt_tokens(renderer: ChatRenderer, question: Question) -> list[int]:
    """The rendered chat template, the assistant's turn opened; one image token, not yet expanded."""
    return renderer.token_ids([{"role": "user", "content": question.content}], num_images=1)
