"""What one rank sees of a mismatch stops all of them, before any has taken the optimizer step."""

from __future__ import annotations

import json
from pathlib import Path

import torch.multiprocessing

from tests.addresses import free_address
from tests.parallel.gap_ranks import run


def test_a_mismatch_that_one_rank_sees_stops_both(tiny_vl: Path, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run, args=(2, tiny_vl, free_address(), tmp_path), nprocs=2)
    for rank in range(2):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        sentences = {
            "gap": "the largest log-prob gap of this mini-batch is 0.5, rl_config.logprob_gap_bound is 0.1",
            "nan": "log-probs of the rollout engine are not finite; nothing was updated",
        }
        for fault, sentence in sentences.items():
            said, moved = seen[fault]
            assert sentence in said, (rank, fault)
            assert not moved, (rank, fault)
        assert seen["none"] == ["", True], rank
