"""Supervised training of a tiny model until its held-out accuracy is reached, in plain torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

BATCH = 32
LEARNING_RATE = 1e-3
WARMUP_STEPS = 20


@dataclass(frozen=True)
class Stage:
    """Stops at an accuracy, not at a number of steps: the curve is flat for a while, then steep, and where depends on the seed.

    Example: Stage("sight", stop=0.9, steps=800, first_look=100, look_every=10)
    """

    title: str
    stop: float
    """Held-out accuracy that ends the stage."""
    steps: int
    """Giving up is an error after so many."""
    first_look: int
    """Answering is dear next to a step, and hopeless before the format is learned."""
    look_every: int


def train(model: PreTrainedModel, loss_of_batch: Callable[[], torch.Tensor], accuracy: Callable[[], float], stage: Stage) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    seen = 0.0
    with tqdm(range(1, stage.steps + 1), desc=f"{stage.title}, until {stage.stop:.2f} are right", unit="step") as bar:
        for step in bar:
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, step / WARMUP_STEPS)
            loss = loss_of_batch()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            if step >= stage.first_look and step % stage.look_every == 0:
                seen = accuracy()
                bar.set_postfix(loss=f"{loss.item():.3f}", right=f"{seen:.2f}")
            if seen >= stage.stop:
                return
    raise SystemExit(f"{stage.title}: {seen:.2f} of the answers are right after {stage.steps} steps, not {stage.stop}: try another --seed")


def save(model: PreTrainedModel, source: Path, out: Path) -> None:
    """The folder `source` with the model's weights, whole or not at all."""
    unfinished = out.with_name(out.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(source, unfinished, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(unfinished)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(unfinished, out)
