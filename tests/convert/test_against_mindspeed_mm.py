"""mm-convert beside the converters of MindSpeed-MM and MindSpeed-LLM, whose output for the same tiny checkpoints is in this folder.

The two .json hold its digests. `written_by` of a layout names the releases that are right there; docs/convert.md says where they are not.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.convert.converting import digests, digests_of_hf, run
from tests.convert.hashed_checkpoint import make_checkpoint, qwen2_5, qwen2_5_vl
from tests.convert.hashed_experts import deepseek_v3, expert_shapes, qwen3_moe

MM = json.loads((Path(__file__).parent / "mindspeed_mm_digests.json").read_text())
LLM = json.loads((Path(__file__).parent / "mindspeed_llm_digests.json").read_text())
WHOLE = [name for name in MM["layouts"] if "vit_only" not in name]


def test_the_checkpoints_are_those_that_the_digests_were_made_from(hf):
    assert {kind: digests_of_hf(hf[kind]) for kind in MM["checkpoints"]} == MM["checkpoints"]


@pytest.mark.parametrize("name", MM["layouts"])
def test_every_file_and_tensor_is_that_of_mindspeed_mm(name, converted):
    assert digests(converted(name)) == MM["layouts"][name]["files"]


@pytest.mark.parametrize("name", LLM["layouts"])
def test_every_file_and_tensor_is_that_of_mindspeed_llm(name, hf, tmp_path, capsys):
    layout = LLM["layouts"][name]
    source, options = hf[layout["checkpoint"]], layout["options"]
    assert run("hf_to_mm", **{"mm_dir": tmp_path / "mg", "hf_config.hf_dir": source, "format.style": "mcore"}, **options) == 0
    assert digests(tmp_path / "mg") == layout["files"]
    read = {"mm_dir": tmp_path / "mg", "save_hf_dir": tmp_path / "back", "hf_config.hf_dir": source}
    if {"parallel_config.tp_size", "format.expert_names"} <= options.keys():
        assert run("mm_to_hf", **read) == 2
        assert "say it with moe_tp_extend_ep" in capsys.readouterr().err
        read["format.moe_tp_extend_ep"] = options.get("format.moe_tp_extend_ep", False)
    assert run("mm_to_hf", **read) == 0
    assert digests_of_hf(tmp_path / "back") == digests_of_hf(source)


@pytest.mark.parametrize("name", WHOLE)
def test_back_to_hugging_face(name, hf, converted, tmp_path):
    kind = MM["layouts"][name]["checkpoint"]
    assert run("mm_to_hf", **{"mm_dir": converted(name), "save_hf_dir": tmp_path / "back", "hf_config.hf_dir": hf[kind]}) == 0
    assert digests_of_hf(tmp_path / "back") == MM["checkpoints"][kind]


@pytest.mark.parametrize("name", WHOLE)
def test_resplit_is_what_a_direct_conversion_writes(name, hf, converted, tmp_path):
    layout = MM["layouts"][name]
    kind, stages = layout["checkpoint"], layout["options"]["parallel_config.llm_pp_layers"][0]
    # From one stage to several a tied model gains its output layer, the other way it loses it.
    target = f"{kind}_tp2_pp2" if len(stages) == 1 else f"{kind}_tp1_pp1"
    options = {f"target_{key}": value for key, value in MM["layouts"][target]["options"].items()}
    assert run("resplit", **{"source_dir": converted(name), "target_dir": tmp_path / "mm", "hf_config.hf_dir": hf[kind]}, **options) == 0
    assert digests(tmp_path / "mm") == MM["layouts"][target]["files"]


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hf")
    configs = {"untied": qwen2_5_vl(False), "tied": qwen2_5_vl(True), "untied_text": qwen2_5(False), "tied_text": qwen2_5(True)}
    found = {name: make_checkpoint(folder / name, config) for name, config in configs.items()}
    experts = {"qwen3_moe": qwen3_moe(), "deepseek_v3": deepseek_v3()}
    return found | {name: make_checkpoint(folder / name, config, expert_shapes(config)) for name, config in experts.items()}


@pytest.fixture(scope="module")
def converted(hf, tmp_path_factory):
    """The folder of a layout of the table, converted when it is first asked for."""
    folder = tmp_path_factory.mktemp("mm")

    def convert(name: str) -> Path:
        layout = MM["layouts"][name]
        if not (folder / name).exists():
            assert run("hf_to_mm", **{"mm_dir": folder / name, "hf_config.hf_dir": hf[layout["checkpoint"]]}, **layout["options"]) == 0
        return folder / name

    return convert
