"""Models with experts under every layout that is offered for them: the log-probs and the gradients of one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from mindspeed_mm_rl.models.weight_files import read_config
from mindspeed_mm_rl.models.weight_sources import HuggingFaceSource, SavedSource
from tests.addresses import free_address
from tests.parallel.expert_ranks import LENGTHS, run, save
from tests.plans import train_plan
from tests.rank_pool import RankPool
from tests.tiny import make_tiny_text

SIZES = {"hidden": 64, "intermediate": 96, "heads": 4, "layers": 2, "weight_std": 0.15}
FAMILIES = {"qwen3_moe": {"kv_heads": 2, "head_dim": 32}, "deepseek_v3": {"kv_heads": 4}}
TENSOR = {"tensor_parallel_size": 2, "sequence_parallel": True}
LAYOUTS = {
    "EP2": (2, {"expert_parallel_size": 2}),
    "TP2+SP, experts cut": (2, {**TENSOR, "expert_tensor_parallel_size": 2}),
    "TP2+SPxEP2": (2, {**TENSOR, "expert_parallel_size": 2}),
    "TP2+SPxEP2, two replicas of each expert": (4, {**TENSOR, "expert_parallel_size": 2}),
    "TP2+SPxEP2, experts cut": (4, {**TENSOR, "expert_parallel_size": 2, "expert_tensor_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(seconds=60.0) as pool:
        yield pool


@pytest.fixture(scope="module", params=FAMILIES)
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pool: RankPool) -> tuple[Path, Path, torch.Tensor]:
    """Model, file of the gradients of one process, its log-probs."""
    folder = make_tiny_text(tmp_path_factory.mktemp("model"), family=request.param, **SIZES, **FAMILIES[request.param])
    reference = tmp_path_factory.mktemp("reference") / "gradients.pt"
    ((logprobs, _),) = pool.run(1, run, train_plan(folder), reference)
    return folder, reference, torch.cat([torch.tensor(logprobs[row]) for row in range(len(LENGTHS))])


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_equal_one_process(pool: RankPool, alone: tuple[Path, Path, torch.Tensor], name: str):
    folder, reference, expected = alone
    world, layout = LAYOUTS[name]
    answers = pool.run(world, run, train_plan(folder, **layout), reference)
    logprobs = {row: values for by_row, _ in answers for row, values in by_row.items()}
    assert expected.std() > 0.5
    torch.testing.assert_close(torch.cat([torch.tensor(logprobs[row]) for row in range(len(LENGTHS))]), expected, atol=1e-5, rtol=0)
    worst = max(((off, weight) for _, errors in answers for weight, off in errors.items()), default=(0.0, ""))
    assert worst[0] <= 1e-5, worst


@pytest.mark.parametrize(("family", "name"), [("qwen3_moe", "EP2"), ("deepseek_v3", "TP2+SP, experts cut"), ("deepseek_v3", "TP2+SPxEP2")])
def test_a_save_has_every_expert_under_its_number(family: str, name: str, tmp_path: Path):
    """Read by one process: what one layout writes is whole for every other."""
    folder = make_tiny_text(tmp_path / "model", family=family, **SIZES, **FAMILIES[family])
    world, layout = LAYOUTS[name]
    (tmp_path / "save").mkdir()
    # Not in the pool: megatron's writers are processes too, which daemons may not have.
    arguments = (world, free_address(), train_plan(folder, **layout), tmp_path / "save")
    torch.multiprocessing.spawn(save, args=arguments, nprocs=world)
    config = read_config(folder)
    saved, written = SavedSource(tmp_path / "save", config), HuggingFaceSource(folder, config)
    assert saved.shapes == written.shapes
    assert all(torch.equal(saved[tensor], written[tensor]) for tensor in written.shapes)
