"""What a training process holds, against what mm-convert writes for the same layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_mm_rl.models.names import entries, tied_output
from mindspeed_mm_rl.models.placement import Layout, placement, with_output
from mindspeed_mm_rl.models.rank_pieces import Grid, GridPlace, chunk_pieces, even_stages, grid_entries
from mindspeed_mm_rl.models.weight_files import read_config


def test_layers_are_dealt_evenly_and_ends_get_fewer():
    assert even_stages(14, 4) == ((3, 4, 4, 3),)
    assert even_stages(28, 4) == ((7, 7, 7, 7),)
    assert even_stages(5, 2) == ((3, 2),)


def test_virtual_stages_take_turns():
    grid = Grid(((2, 3), (1, 4)))
    assert [list(grid.layer_numbers(rank, virtual)) for virtual in (0, 1) for rank in (0, 1)] == [[0, 1], [2, 3, 4], [5], [6, 7, 8, 9]]


@pytest.mark.parametrize(("stages", "tensor"), [(((2,),), 1), (((2,),), 2), (((1, 1),), 2), (((1, 0), (0, 1)), 1)])
@pytest.mark.parametrize("model", ["tiny_vl", "tiny_text"])
def test_a_process_holds_what_its_file_holds(model: str, stages: tuple, tensor: int, request: pytest.FixtureRequest):
    folder: Path = request.getfixturevalue(model)
    config = read_config(folder)
    grid = Grid(stages, tensor)
    vision = tuple(tuple(3 if (virtual, rank) == (0, 0) else 0 for rank in range(grid.pipeline)) for virtual in range(grid.virtual))
    table = entries(config)
    if grid.pipeline > 1 and model == "tiny_text":
        table = with_output(table, tied_output(config))
    files = list(placement(table, Layout(text=stages, vision=vision if model == "tiny_vl" else (), tensor=tensor)))
    assert len(files) == tensor * grid.pipeline
    for file in files:
        for virtual, expected in enumerate(file.models.values()):
            place = GridPlace(file.rank.tensor, file.rank.pipeline)
            assert chunk_pieces(grid_entries(config, grid), grid, place, virtual) == expected


def test_a_network_without_vision_holds_text_alone(tiny_vl: Path):
    grid = Grid(((2,),))
    pieces = chunk_pieces(grid_entries(read_config(tiny_vl), grid, with_vision=False), grid, GridPlace())
    assert pieces and all(piece.entry.part == "text" for piece in pieces)
