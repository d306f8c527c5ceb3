"""model_optim_rng.pt files, of MindSpeed-MM, megatron and MindSpeed-LLM: mapped into memory, and nothing in them is ever run."""

from __future__ import annotations

import argparse
import io
import pathlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

MODEL_KEY = re.compile(r"model\d*")
_ENUMS = {
    "megatron.core.enums": ("ModelType",),
    "megatron.core.transformer.enums": ("AttnBackend", "AttnMaskType", "AttnType", "CudaGraphScope", "LayerType"),
    "megatron.core.rerun_state_machine": ("RerunMode", "RerunState", "RerunDiagnostic"),
}
"""What megatron's training saves hold beside weights; only their names and values are kept."""
_NAMED = re.compile(r"(?:GLOBAL|Unsupported (?:class|global):?)\s+([\w.]+)")


class _EnumValue:
    """Stands for a member of one of megatron's enumerations, which need not be installed."""

    def __init__(self, *value: Any) -> None:
        self.value = value


def _array(*arguments: Any) -> Any:
    """numpy before 2.0 says where its arrays come from by another name."""
    return numpy.ndarray.__new__(arguments[0], arguments[1], arguments[2])


def _named(base: Any, module: str, name: str) -> Any:
    if isinstance(base, type):
        return type(name, (base,), {"__module__": module, "__qualname__": name})

    def function(*arguments: Any) -> Any:
        return base(*arguments)

    function.__module__, function.__qualname__, function.__name__ = module, name, name
    return function


_HARMLESS: list[Any] = [
    argparse.Namespace,
    io.BytesIO,
    pathlib.PosixPath,
    numpy.ndarray,
    numpy.dtype,
    *(type(numpy.dtype(code)) for code in ("u1", "u4", "u8", "i4", "i8", "f4", "f8")),
    *(_named(_array, module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    *(_named(_EnumValue, module, name) for module, names in _ENUMS.items() for name in names),
]


def read_models(path: Path) -> dict[str, dict[str, Tensor]]:
    """The weights of a file by `model` (or model0, model1, ... with virtual stages) and name; pages are read when a tensor is used.

    Raises ValueError when the file is damaged, holds no model, or asks for anything but data.
    """
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            # Ascend's torch takes nothing but text for the path of a file to map.
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged, or holds more than weights, which is never unpickled ({_reason(error)})") from error
    models = {key: value for key, value in content.items() if MODEL_KEY.fullmatch(key)} if isinstance(content, dict) else {}
    if not models or not all(isinstance(model, Mapping) for model in models.values()):
        raise ValueError(f"{path} has no `model`: it is not what mm-convert or megatron write")
    return {key: {name: tensor for name, tensor in model.items() if isinstance(tensor, Tensor)} for key, model in models.items()}


def _reason(error: Exception) -> str:
    text = str(error)
    found = _NAMED.search(text)
    return f"it asks for {found[1]}" if found else (text.strip().splitlines() or [type(error).__name__])[0]
