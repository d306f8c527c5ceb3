"""Every pair of layouts of every family, and many random ones: resplit is as good as a conversion from the Hugging Face model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies

from tests.convert.conftest import model  # noqa: F401  a fixture
from tests.convert.families import FAMILIES
from tests.convert.layouts import check_pair, choices, ways_of

LAW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], print_blob=True)
PAIRS = {
    f"{family}: {first} -> {second}": (family, ways_of(family)[first], ways_of(family)[second])
    for family in FAMILIES
    for first in ways_of(family)
    for second in ways_of(family)
}


@pytest.mark.parametrize(("family", "first", "second"), PAIRS.values(), ids=PAIRS)
def test_every_pair(family, first, second, model: Callable[..., Path], tmp_path: Path) -> None:  # noqa: F811
    check_pair(model(family, dtype=torch.bfloat16), tmp_path, first, second)


@LAW
@pytest.mark.parametrize("family", FAMILIES)
@given(data=strategies.data())
def test_random_pairs(family: str, data: strategies.DataObject, model: Callable[..., Path]) -> None:  # noqa: F811
    tied = data.draw(strategies.booleans()) and "deepseek" not in family
    source = model(family, tied, data.draw(strategies.sampled_from([torch.float32, torch.bfloat16])))
    with tempfile.TemporaryDirectory() as folder:
        check_pair(source, Path(folder), data.draw(choices(family)), data.draw(choices(family)))
