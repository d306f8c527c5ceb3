"""Where the vision encoder runs, as users say it: plans, notes and refusals."""

from pathlib import Path

import pytest

from mindspeed_mm_rl.config.derive import make_plan
from mindspeed_mm_rl.config.load import load_config
from tests.unit.test_config_load import DAPO_7B, USERS_COLOCATED
from tests.unit.test_config_plan import BASE, hf_folder, merged, plan_of, write

COLOCATED = "rl_config.colocate_actor_and_vit=true"
PICTURES = "model=examples/rl/model/qwen2.5vl_7b.json"
TRAINED = "model={image_encoder: {vision_encoder: {freeze: false}}}"


def plan_7b(folder: Path, *overrides: str):
    """Qwen2.5-VL-7B: 16 heads and 3420 = 4 x 855 intermediate values in the vision encoder."""
    return make_plan(load_config(DAPO_7B, [f"megatron_training.tokenizer_name_or_path={hf_folder(folder / 'hf')}", *overrides]))


def test_without_the_switch_the_actor_encodes(tmp_path):
    plan = plan_of(tmp_path, PICTURES, "vit_config.load=elsewhere", "vit_config.tensor_model_parallel_size=1")
    assert plan.vision is None and plan.train.with_vision
    assert any("vit_config: load, tensor_model_parallel_size: rl_config.colocate_actor_and_vit is false" in note for note in plan.notes)


def test_the_workers_have_a_layout_and_weights_of_their_own(tmp_path):
    actor = ["actor_config.load=policy", "rl_config.actor_resource.num_npus=4", "megatron_training.lr=1e-5"]
    own = ["vit_config.tensor_model_parallel_size=2", "vit_config.load=vit"]
    plan = plan_of(tmp_path, PICTURES, COLOCATED, *actor, *own)
    assert (plan.vision.load, plan.vision.tensor_parallel_size, plan.train.tensor_parallel_size) == (str(Path("vit").absolute()), 2, 1)
    assert plan.vision.optimizer == plan.train.optimizer and plan.vision.with_vision and not plan.train.with_vision
    common = plan_of(tmp_path, PICTURES, COLOCATED, *actor)
    assert common.vision.load == common.train.load == str(Path("policy").absolute())


def test_the_actors_layout_is_not_the_workers(tmp_path):
    text = BASE + "actor_config: {tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2}\n"
    plan = make_plan(load_config(write(tmp_path, text), [PICTURES, COLOCATED, "rl_config.actor_resource.num_npus=4"]))
    assert (plan.train.tensor_parallel_size, plan.train.pipeline_parallel_size) == (2, 2)
    assert (plan.vision.tensor_parallel_size, plan.vision.pipeline_parallel_size, plan.vision.sequence_parallel) == (1, 1, False)


def test_a_users_colocated_file_makes_a_plan(tmp_path):
    plan = make_plan(load_config(merged(tmp_path, USERS_COLOCATED)))
    assert plan.vision.tensor_parallel_size == 1 and plan.train.tensor_parallel_size == 4
    assert not any("colocate" in note or "vit_config" in note for note in plan.notes)


def test_keys_that_are_the_actors_alone_are_named(tmp_path):
    notes = plan_of(tmp_path, PICTURES, COLOCATED, "vit_config.lr=1e-3", "vit_config.micro_batch_size=4").notes
    assert "vit_config: lr (0.001) isn't used: the actor's acts on both" in notes


@pytest.mark.parametrize(("model", "with_vision"), [(PICTURES, False), (TRAINED, True)])
def test_a_critic_shares_a_frozen_encoder_and_has_its_own_of_a_trained_one(tmp_path, model, with_vision):
    plan = plan_of(tmp_path, model, COLOCATED, "megatron_training.stage=ray_ppo")
    assert plan.critic.with_vision is with_vision and not plan.train.with_vision
    assert plan_of(tmp_path, model, "megatron_training.stage=ray_ppo").critic.with_vision


REFUSED = [
    ([COLOCATED], r"colocate_actor_and_vit \(true\) needs a model with a vision encoder.*set it to false"),
    ([PICTURES, COLOCATED, "vit_config.pipeline_model_parallel_size=2"], r"\(2\) must be 1.*set vit_config.pipeline_model_parallel_size=1"),
    (
        [PICTURES, COLOCATED, "vit_config.tensor_model_parallel_size=4", "rl_config.actor_resource.num_npus=6"],
        r"vit_config.tensor_model_parallel_size \(4\) must divide rl_config.actor_resource.num_npus \(6\); 1, 2, 3 or 6 would do",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_a_placement_that_cannot_be_is_refused(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        plan_of(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("devices", "size", "message"),
    [
        (24, 3, r"vit_config.tensor_model_parallel_size \(3\) must divide vision_config.num_heads \(16\) .*; 1, 2 or 4 would do"),
        (8, 8, r"\(8\) must divide vision_config.intermediate_size \(3420\) of config.json; 1, 2 or 4 would do"),
        (2, 4, r"\(4\) must divide rl_config.actor_resource.num_npus \(2\); 1 or 2 would do"),
    ],
)
def test_vision_heads_are_never_cut(tmp_path, devices, size, message):
    layout = [f"rl_config.actor_resource.num_npus={devices}", f"vit_config.tensor_model_parallel_size={size}"]
    with pytest.raises(ValueError, match=message):
        plan_7b(tmp_path, COLOCATED, *layout, "actor_config.tensor_model_parallel_size=1")


def test_an_encoder_inside_the_actor_must_fit_the_actors_layout(tmp_path):
    folder = hf_folder(tmp_path / "hf", num_attention_heads=32, num_key_value_heads=8, hidden_size=4096)
    sizes = [
        "rl_config.actor_resource.num_npus=8",
        "actor_config.tensor_model_parallel_size=8",
        "generate_config.kv_cache_bytes=1000000000",
    ]
    with pytest.raises(ValueError, match=r"actor_config.tensor_model_parallel_size \(8\) must divide.*3420.*or give the encoder workers"):
        plan_of(tmp_path, f"megatron_training.tokenizer_name_or_path={folder}", *sizes)
