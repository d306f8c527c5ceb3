"""Keys of memory: what leaves the devices, and what is computed again."""

from __future__ import annotations

import pytest

from mindspeed_mm_rl.config.memory import offload_parts, weight_carrier
from mindspeed_mm_rl.config.schema import GenerateConfig
from mindspeed_mm_rl.platforms import device
from tests.unit.test_config_layout import DENSE, PP, plan_of

ALL = {"offload_train_param": True, "offload_train_grad": True, "offload_train_optimizer": True}


def test_on_devices_the_reference_leaves_and_what_is_asked_for():
    assert offload_parts(GenerateConfig(**ALL), "npu") == ("reference", "param", "grad", "optimizer")
    assert offload_parts(GenerateConfig(offload_train_optimizer=True), "cuda") == ("reference", "optimizer")
    assert offload_parts(GenerateConfig(), "cuda") == ("reference",)
    assert offload_parts(GenerateConfig(**ALL), "cpu") == ()


def test_on_cpu_nothing_leaves_and_that_is_said(tmp_path):
    plan = plan_of(tmp_path, DENSE, 1, "", *(f"generate_config.{key}=true" for key in ALL))
    assert plan.train.offload == ()
    assert any("offload_train_param, offload_train_grad, offload_train_optimizer isn't used: on CPU" in note for note in plan.notes)
    assert not any("offload" in note for note in plan_of(tmp_path, DENSE, 1, "").notes)


def test_weights_go_through_the_device_where_they_stay_and_its_memory_can_be_opened():
    assert weight_carrier(GenerateConfig(), "cuda", {}) == "device"
    assert weight_carrier(GenerateConfig(offload_train_param=True), "cuda", {}) == "host"
    assert weight_carrier(GenerateConfig(), "npu", {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}) == "host"
    # The shipped runtime_env.yaml has variables of all devices.
    assert weight_carrier(GenerateConfig(), "cuda", {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}) == "device"
    assert weight_carrier(GenerateConfig(), "cuda", {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}) == "host"
    assert weight_carrier(GenerateConfig(), "cpu", {}) == "host"
    assert weight_carrier(GenerateConfig(weight_carrier="host"), "cuda", {}) == "host"
    assert weight_carrier(GenerateConfig(weight_carrier="device"), "cpu", {}) == "device"
    with pytest.raises(ValueError, match="PYTORCH_CUDA_ALLOC_CONF to 'expandable_segments:False' in rl_config.runtime_env_path"):
        weight_carrier(GenerateConfig(weight_carrier="device"), "cuda", {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})


def test_where_no_process_can_open_the_memory_of_another_weights_take_the_other_way(monkeypatch):
    monkeypatch.setattr(device, "can_share_memory", lambda: False)
    assert weight_carrier(GenerateConfig(), "npu", {}) == "host"
    with pytest.raises(ValueError, match="weight_carrier device needs ipc handles, which torch_npu has since 2.7; set it to host or auto"):
        weight_carrier(GenerateConfig(weight_carrier="device"), "npu", {})


FULL = "recompute_granularity=full"


@pytest.mark.parametrize(
    ("keys", "model", "expected"),
    [
        ("", "{}", (None, "uniform", 1)),
        (FULL, "{}", ("full", "uniform", 1)),
        (f"{FULL} recompute_method=block recompute_num_layers=3", "{}", ("full", "block", 3)),
        ("", "{recompute_granularity: full, recompute_method: uniform, recompute_num_layers: 4}", ("full", "uniform", 4)),
        ("recompute_num_layers=2", "{recompute_granularity: full, recompute_num_layers: 4}", ("full", "uniform", 2)),
    ],
)
def test_layers_that_are_computed_again(tmp_path, keys, model, expected):
    plan = plan_of(tmp_path, DENSE, 1, keys, f"model={{text_decoder: {model}}}").train
    assert (plan.recompute, plan.recompute_method, plan.recompute_num_layers) == expected


def test_groups_of_layers_must_fit_every_stage(tmp_path):
    refused = (
        r"actor_config.recompute_num_layers \(4\) must divide the layers of every pipeline stage \(14\) with recompute_method uniform; "
        r"1, 2, 7 or 14 would do, or recompute_method block"
    )
    with pytest.raises(ValueError, match=refused):
        plan_of(tmp_path, DENSE, 2, f"{PP}=2 {FULL} recompute_num_layers=4")
    with pytest.raises(ValueError, match=r"\(12, 16\) with recompute_method uniform; 1, 2 or 4 would do"):
        plan_of(tmp_path, DENSE, 2, f"{PP}=2 num_layer_list=12,16 {FULL} recompute_num_layers=8")
    plan_of(tmp_path, DENSE, 2, f"{PP}=2 {FULL} recompute_method=block recompute_num_layers=4")
    plan_of(tmp_path, DENSE, 1, f"{FULL} recompute_num_layers=4")


def test_settings_of_layers_without_full_are_said_not_to_act(tmp_path):
    notes = plan_of(tmp_path, DENSE, 1, "recompute_method=uniform recompute_num_layers=4").notes
    assert any("recompute_method, recompute_num_layers isn't used: it belongs to recompute_granularity full" in note for note in notes)


def test_a_model_file_with_a_wrong_number_of_layers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="recompute_num_layers must be a number of layers, not 0"):
        plan_of(tmp_path, DENSE, 1, "", "model={text_decoder: {recompute_num_layers: 0}}")
