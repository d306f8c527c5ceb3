"""mm-convert as users call it, and what it wrote in a form that can be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from checkpoint.convert_cli import main
from tests.convert.hashed_checkpoint import described


def run(command: str, **options: Any) -> int:
    """Exit status of the command with the flags that users type."""
    flags = [f"--cfg.{key}={value if isinstance(value, str | Path) else json.dumps(value)}" for key, value in options.items()]
    return main(["Qwen2_5_VLConverter", command, *flags])


def digests(folder: Path) -> dict[str, Any]:
    """Every file of a converted folder, every tensor of each."""
    return {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def digests_of_hf(folder: Path) -> dict[str, str]:
    return {name: described(tensor) for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def _content(path: Path) -> Any:
    if path.suffix != ".pt":
        return path.read_text()
    models = torch.load(path, weights_only=True)
    return {key: {n: described(t) for n, t in part.items()} if isinstance(part, dict) else part for key, part in models.items()}
