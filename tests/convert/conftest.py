"""One folder of every kind of tiny model, written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.convert.families import write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """model(family, tied, dtype) -> its Hugging Face folder."""
    base, made = tmp_path_factory.mktemp("models"), {}

    def of(family: str, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
        key = (family, tied, dtype)
        if key not in made:
            made[key] = write_model(base / f"{family}-{tied}-{str(dtype).rpartition('.')[2]}", family, tied, dtype)
        return made[key]

    return of
