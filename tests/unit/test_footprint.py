"""The estimate of memory: what leaves, what stays, what is said of too little; how much a layer keeps, against autograd."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mindspeed_mm_rl.cli.memory_view import memory_view, problems, render_footprint
from mindspeed_mm_rl.engines import footprint
from mindspeed_mm_rl.engines.footprint import Footprint, Phase, Rollout, State, Trainer
from mindspeed_mm_rl.models.families import read_architecture
from mindspeed_mm_rl.models.rank_pieces import Grid, grid_entries
from mindspeed_mm_rl.platforms.memory import GIB, KNOWN, DeviceMemory
from tests.plans import whole_plan
from tests.recipes import recipe_plan

ALL = ("param", "grad", "optimizer", "reference")


def trainer(*leaves: str) -> Trainer:
    return Trainer(State(parameters=2, gradients=4, optimizer=6), forward=100, backward=1000, reference=8, leaves=leaves)


def test_what_may_not_leave_is_there_in_every_phase():
    assert trainer().held() == 20 and trainer().on_host == 0
    assert trainer("reference").held("param") == 12
    assert trainer(*ALL).held() == 0
    assert trainer(*ALL).held("reference") == 8
    assert trainer(*ALL).update == 2 + 4 + 6 + 1000
    assert trainer(*ALL).on_host == 2 + 6 + 8


def test_a_pipeline_stage_holds_as_many_micro_batches_as_stages_are_behind_it():
    one, two = Grid(((2, 2, 2, 2),)), Grid(((1, 1, 1, 1), (1, 1, 1, 1)))
    assert [footprint.in_flight(one, stage) for stage in range(4)] == [4, 3, 2, 1]
    # Interleaved: warm-up of the schedule, 2 (stages behind) + (pieces - 1) stages, and one, each of half the layers.
    assert [footprint.in_flight(two, stage) for stage in range(4)] == [5.5, 4.5, 3.5, 2.5]


def test_a_recipe_by_hand():
    """Qwen2.5-VL-7B, TP4 x DP2: 7.6156 billion trained numbers, of which a rank has a quarter."""
    plan = recipe_plan("grpo_trainer_qwen25vl_7b")
    found = footprint.footprint(plan, read_architecture(plan.train.hf_path), 61 * GIB)
    state, trained = found.trainer.state, 7_615_616_512 / 4
    assert (state.gradients, state.optimizer) == (pytest.approx(4 * trained, rel=1e-3), pytest.approx(12 * trained / 2, rel=1e-3))
    assert found.rollout.weights == pytest.approx(2 * 7_615_616_512, rel=1e-3)
    # 28 layers of 4 key and 4 value heads of 128 numbers in bfloat16.
    assert found.rollout.token == 28 * 8 * 128 * 2
    # The language model once a node, and for each device weights (frozen encoder too), optimizer, reference, the engine's weights.
    assert found.host_once == 2 * 7_615_616_512
    assert found.host == 2 * state.parameters + state.optimizer + found.rollout.weights


def test_too_little_memory_is_said_with_what_would_help():
    small = DeviceMemory("small", 20 * GIB, 8)
    rollout = Rollout(weights=15 * GIB, cache=GIB, token=GIB // 4)
    found = Footprint((Phase("rollout", 16 * GIB, GIB), Phase("update", 30 * GIB, GIB)), rollout, trainer(), 0, 0)
    told = list(problems(found, small, longest=5))
    assert told[0].startswith("update 31.0 GiB: estimated to be over a device's 20.0;") and "recompute_granularity full" in told[0]
    assert "leaves room for 4 tokens, fewer than the longest sequence (5)" in told[1] and "infer_tensor_parallel_size" in told[1]
    assert [line for line in render_footprint(found, small, 5) if line.startswith("warning: ")] == [f"warning: {line}" for line in told]
    assert list(problems(found, KNOWN["h100"], longest=4)) == []


def test_a_run_on_a_part_of_a_machine_takes_no_more_of_its_memory(tiny_text: Path):
    lines = memory_view(whole_plan(tiny_text, tiny_text, tiny_text), KNOWN["h100"])
    assert any(line.strip().startswith("host memory of a machine with 1 of them:") for line in lines)


@pytest.mark.skipif(torch.__version__.startswith("2.5"), reason="with grouped heads torch 2.5 keeps the matrix of attention on CPU")
def test_a_layer_keeps_about_twice_what_its_matrices_put_out(tiny_text: Path, one_rank: None):
    from mindspeed_mm_rl.models.qwen2_5_vl import build_policy

    architecture, tokens = read_architecture(tiny_text), 512
    network = build_policy(architecture)
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.arange(tokens) % 100
    layout = network.layout([ids], [[]])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(ids, layout)
    taken = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in weights)
    grid = Grid(((architecture.text.num_layers,),))
    pieces = footprint.stage_pieces(grid_entries(architecture.raw, grid), grid, 0)
    put_out = sum(footprint.layer_outputs(pieces, architecture.text, 1).values()) * tokens * 4
    assert taken / put_out == pytest.approx(footprint.KEPT, rel=0.3)
