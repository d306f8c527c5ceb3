"""What is checked of every recipe, and of a few of them in each run of the tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from mindspeed_mm_rl.cli.memory_view import problems, render_footprint
from mindspeed_mm_rl.config.plan import Plan, TrainPlan
from mindspeed_mm_rl.engines.footprint import Footprint, footprint
from mindspeed_mm_rl.engines.megatron.process_groups import grid as grid_of
from mindspeed_mm_rl.models.families import read_architecture
from mindspeed_mm_rl.models.names import HF_EMBEDDING, Entry, Shape, canonical_hf_name, entries, with_value_head
from mindspeed_mm_rl.models.placement import Piece
from mindspeed_mm_rl.models.rank_pieces import Grid, GridPlace, chunk_pieces, grid_entries
from mindspeed_mm_rl.models.weight_files import read_config
from mindspeed_mm_rl.platforms.memory import GIB, DeviceMemory
from tests.recipe_ranks import NetworksOfPlaces
from tests.recipes import PUBLISHED, recipe_plan

_GUIDE = Path(__file__).parents[1] / "docs/recipes.md"


def check_names_and_shapes(model: str) -> None:
    """Those of the model that transformers builds."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(PUBLISHED / model)
    kind = AutoModelForImageTextToText if "vision_config" in read_config(PUBLISHED / model) else AutoModelForCausalLM
    with torch.device("meta"):
        built = kind.from_config(config)
    theirs: dict[str, Shape] = {}
    for name, weight in built.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            theirs |= _on_disk(canonical_hf_name(name), tuple(weight.shape))
    ours = [pair for entry in entries(read_config(PUBLISHED / model)) for pair in zip(entry.hf, entry.hf_shapes, strict=True)]
    assert len(dict(ours)) == len(ours)
    assert dict(ours) == theirs


def _on_disk(name: str, shape: Shape) -> dict[str, Shape]:
    """transformers 5 joins a layer's experts in memory, [experts, rows, columns]; files have them one by one."""
    experts, _, part = name.rpartition(".experts.")
    match part:
        case "gate_up_proj":
            each = {"gate_proj": (shape[1] // 2, shape[2]), "up_proj": (shape[1] // 2, shape[2])}
        case "down_proj":
            each = {"down_proj": shape[1:]}
        case _:
            return {name: shape}
    return {f"{experts}.experts.{n}.{own}.weight": size for n in range(shape[0]) for own, size in each.items()}


def check_networks(train: TrainPlan, critic: bool, built: NetworksOfPlaces) -> None:
    """A rank of each stage has what it will load, and the ranks together every weight once."""
    table, grid = _table(train, critic)
    assert [place for place, _ in built] == [GridPlace(pipeline=stage) for stage in range(grid.pipeline)]
    for place, networks in built:
        for virtual, shapes in enumerate(networks):
            assert shapes == {piece.name: piece.entry.mm_shape for piece in chunk_pieces(table, grid, place, virtual)}
    names: Counter[str] = Counter()
    for stage in range(grid.pipeline):
        for virtual in range(grid.virtual):
            first = (stage, virtual) == (0, 0)
            whole = [entry for entry in table if entry.layer is None or (entry.part != "text" and first)]
            names.update(_whole_weights(whole, grid, stage, virtual))
            for number in grid.layer_numbers(stage, virtual):
                own = [entry for entry in table if entry.part == "text" and entry.layer == number]
                names.update(_whole_weights(own, grid, stage, virtual))
    assert names == Counter(name for entry in table for name in entry.hf)
    assert {name for name, count in names.items() if count > 1} <= {HF_EMBEDDING}


def _table(train: TrainPlan, critic: bool) -> tuple[list[Entry], Grid]:
    architecture = read_architecture(train.hf_path)
    grid = grid_of(train, architecture.text.num_layers)
    return grid_entries(with_value_head(architecture.raw) if critic else architecture.raw, grid, train.with_vision), grid


def _whole_weights(table: Sequence[Entry], grid: Grid, stage: int, virtual: int) -> list[str]:
    """Hugging Face's names of the weights of a stage; each is there, as a whole, among the ranks that share it."""
    shared = [entry for entry in table if entry.expert is None]
    experts = [entry for entry in table if entry.expert is not None]
    tensor = [chunk_pieces(shared, grid, GridPlace(rank, stage), virtual) for rank in range(grid.tensor)]
    names = _covered(tensor)
    for expert in range(grid.expert) if experts else ():
        # Which experts a rank has goes by their numbers, so it must see them all.
        places = [GridPlace(0, stage, expert, rank) for rank in range(grid.expert_tensor)]
        names += _covered([chunk_pieces(experts, grid, place, virtual) for place in places])
    return names


def _covered(ranks: Sequence[Sequence[Piece]]) -> list[str]:
    names = []
    for pieces in zip(*ranks, strict=True):
        entry = pieces[0].entry
        assert len({(piece.name, piece.entry.hf, piece.entry.mm_shape) for piece in pieces}) == 1
        for part, name in enumerate(entry.hf):
            cuts = [piece.cuts[part] for piece in pieces]
            if cuts[0] is None:
                assert cuts == [None] * len(cuts)
            else:
                length = entry.hf_shapes[part][cuts[0].dim] // cuts[0].blocks
                assert [(cut.start, cut.stop) for cut in cuts] == [(n * length, (n + 1) * length) for n in range(len(cuts))]
            names.append(name)
    return names


def check_memory(recipe: str, devices: Sequence[DeviceMemory]) -> None:
    """Prints the estimate; nothing is over the device's memory, and the guide says it of the smallest."""
    plan = recipe_plan(recipe)
    for device in devices:
        found = footprint(plan, read_architecture(plan.train.hf_path), device.total_bytes)
        print("\n".join([recipe, *render_footprint(found, device, plan.rollout.max_model_len)]))
        assert list(problems(found, device, plan.rollout.max_model_len)) == []
        assert device != devices[0] or table_row(recipe, plan, found, device) in _GUIDE.read_text().splitlines()


def table_row(recipe: str, plan: Plan, found: Footprint, device: DeviceMemory) -> str:
    """Its line in docs/recipes.md."""
    train, rollout, run = plan.train, plan.rollout, plan.run
    layout = f"TP{train.tensor_parallel_size} PP{train.pipeline_parallel_size}"
    layout += f" EP{train.expert_parallel_size}" if train.expert_parallel_size > 1 else ""
    engine = f"TP{rollout.tensor_parallel_size}" + (f" x {rollout.data_parallel_size}" if rollout.expert_parallel else "")
    gib = {phase.name: f"{phase.total / GIB:.0f}" for phase in found.phases}
    sequences = found.rollout.cached_tokens // rollout.max_model_len if found.rollout else 0
    return " | ".join(
        [
            f"| `{recipe}`",
            f"{run.num_devices} {device.name}",
            layout,
            engine if found.rollout else "",
            f"{run.prompts_per_generation} x {run.samples_per_prompt}" if found.rollout else f"{run.prompts_per_generation} pairs",
            f"{rollout.max_model_len if found.rollout else plan.data.max_pair_length}",
            f"{gib['rollout']}, {sequences}" if found.rollout else "",
            gib["update"],
            f"{found.on_node(device.per_node) / GIB:.0f} |",
        ]
    )
