"""Two tensor-parallel ranks are one policy: same log-probs, same gradients, weights through one sharded checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from tests.parallel.policy_ranks import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_vl: Path) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run, args=(1, False, tiny_vl, folder), nprocs=1)
    return folder


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_ranks_equal_one(folder: Path, tiny_vl: Path, sequence_parallel: bool):
    torch.multiprocessing.spawn(run, args=(2, sequence_parallel, tiny_vl, folder), nprocs=2)
    values, gradients = torch.load(folder / "1_False.pt", weights_only=True)
    split_values, split_gradients = torch.load(folder / f"2_{sequence_parallel}.pt", weights_only=True)
    torch.testing.assert_close(split_values, values, atol=5e-6, rtol=1e-6)
    for name, gradient in gradients.items():
        assert (split_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
