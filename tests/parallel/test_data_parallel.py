"""Two data-parallel ranks compute the gradient of one, whatever they get to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from tests.addresses import free_address
from tests.parallel.update_ranks import CRITIC, SETTINGS, run


# Five groups: uneven shares and micro-batches. One group: the second rank has nothing of its own.
@pytest.mark.parametrize("groups", [5, 1])
def test_two_ranks_compute_the_gradient_of_one(groups: int, tiny_vl: Path, tmp_path: Path) -> None:
    for world in (1, 2):
        torch.multiprocessing.spawn(run, args=(world, tiny_vl, free_address(), tmp_path, groups), nprocs=world)
    one, two = (torch.load(tmp_path / f"{groups}_{world}.pt", weights_only=True) for world in (1, 2))
    for name in (*SETTINGS, CRITIC):
        (gradients, metrics), (split_gradients, split_metrics) = one[name], two[name]
        assert all(gradient.norm() > 0 for gradient in gradients.values())
        for key, gradient in gradients.items():
            assert (split_gradients[key] - gradient).norm() <= 1e-5 * gradient.norm(), (name, key)
        assert split_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6), name
