"""Calls of transformers that versions 4 and 5 spell differently, for the tests that compare with it."""

from __future__ import annotations

import pytest
import torch
import transformers

IS_4 = transformers.__version__.startswith("4.")


def needs_5(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(IS_4, reason=f"transformers {transformers.__version__}: {reason}")


def picture_tokens(ids: torch.Tensor, image_token_id: int) -> dict[str, torch.Tensor]:
    """An argument of a Qwen2.5-VL: transformers 5 asks which tokens are a picture's (1), 4 looks itself."""
    return {} if IS_4 else {"mm_token_type_ids": (ids == image_token_id).int()}


def features_of(found: object) -> torch.Tensor:
    """[image tokens, hidden] of what a vision encoder returned."""
    return found if isinstance(found, torch.Tensor) else found.pooler_output
