"""Layouts: what users' keys become, and which layouts are refused, with the numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from checkpoint.training_yaml import check_training_yaml
from mindspeed_mm_rl.config.derive import make_plan
from mindspeed_mm_rl.config.load import load_config
from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.models.placement import Layout
from tests.unit.test_config_load import write
from tests.unit.test_config_plan import BASE

DENSE = {"num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
         "vocab_size": 152064}  # fmt: skip
MIXTURE = {"num_hidden_layers": 48, "hidden_size": 2048, "intermediate_size": 6145, "num_attention_heads": 32, "num_key_value_heads": 4,
           "vocab_size": 151936, "num_experts": 128, "moe_intermediate_size": 768}  # fmt: skip
LATENT = {"num_hidden_layers": 6, "hidden_size": 7168, "intermediate_size": 18432, "num_attention_heads": 128, "num_key_value_heads": 128,
          "kv_lora_rank": 512, "vocab_size": 129280, "n_routed_experts": 256, "n_shared_experts": 1, "moe_intermediate_size": 2048,
          "first_k_dense_replace": 3, "head_dim": 192}  # fmt: skip


def plan_of(folder: Path, config: dict | None, devices: int, keys: str, *further: str) -> Plan:
    """keys: of actor_config, as "a=1 b=2"; config: config.json, None for a folder that isn't there."""
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    run = [f"megatron_training.tokenizer_name_or_path={folder}", f"rl_config.actor_resource.num_npus={devices}"]
    room = "generate_config.kv_cache_bytes=100000000000"
    return make_plan(load_config(write(folder, BASE), [*run, room, *(f"actor_config.{key}" for key in keys.split()), *further]))


PP, VPP, PIECE = "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage"
TP, CP, EP, ETP = "tensor_model_parallel_size", "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        ("", ()),
        (f"{PP}=4", ()),
        (f"{PP}=3", ()),
        ("num_layer_list=28", ()),
        (f"{PP}=4 num_layer_list=7,7,7,7", ((7, 7, 7, 7),)),
        (f"{PP}=2 num_layer_list=[16,12]", ((16, 12),)),
        (f"{PP}=2 {PIECE}=7", ((7, 7), (7, 7))),
        (f"{PP}=2 {PIECE}=14", ()),
        (f"{PP}=2 {VPP}=7", ((2, 2),) * 7),
        (f"{PP}=2 {VPP}=2 {PIECE}=7", ((7, 7), (7, 7))),
        (f"{VPP}=1", ()),
    ],
)
def test_layers_by_virtual_stage_then_by_pipeline_rank(tmp_path, keys, layers):
    assert plan_of(tmp_path, DENSE, 12, keys).train.pipeline_layers == layers


@pytest.mark.parametrize(
    ("split", "keys", "layers"),
    [
        ("[12,16]", f"{PP}=2", ((12, 16),)),
        ("[[6,8],[7,7]]", f"{PP}=2", ((6, 8), (7, 7))),
        ("[[12,16]]", f"{PP}=2", ((12, 16),)),
        ("[28]", f"{PP}=4", ()),
        ("[12,16]", f"{PP}=2 num_layer_list=20,8", ((20, 8),)),
        ("null", f"{PP}=2 {PIECE}=7", ((7, 7), (7, 7))),
    ],
)
def test_layers_of_the_model_file(tmp_path, split, keys, layers):
    assert plan_of(tmp_path, DENSE, 4, keys, f"model={{text_decoder: {{pipeline_num_layers: {split}}}}}").train.pipeline_layers == layers


def test_the_model_file_knows_the_layers_where_there_is_no_config_json(tmp_path):
    model = "model={text_decoder: {num_layers: 8}}"
    assert plan_of(tmp_path, None, 2, f"{PP}=2 {PIECE}=2", model).train.pipeline_layers == ((2, 2), (2, 2))


@pytest.mark.parametrize(
    ("users_word", "algorithm"),
    [("ulysses_cp_algo", "ulysses"), ("megatron_cp_algo", "all_gather"), ("ulysses", "ulysses"), ("all_gather", "all_gather")],
)
def test_both_ways_of_context_parallel(tmp_path, users_word, algorithm):
    plan = plan_of(tmp_path, DENSE, 2, f"{CP}=2 context_parallel_algo={users_word}").train
    assert (plan.context_parallel_size, plan.context_parallel_algorithm) == (2, algorithm)
    assert plan_of(tmp_path, DENSE, 2, f"{CP}=2").train.context_parallel_algorithm == "ulysses"


@pytest.mark.parametrize(
    ("keys", "expert", "of_each"),
    [
        ("", 1, 1),
        (f"{TP}=4 sequence_parallel=true", 1, 4),
        (f"{EP}=8", 8, 1),
        (f"{TP}=4 {EP}=8 sequence_parallel=true", 8, 1),
        (f"{TP}=4 {EP}=2 {ETP}=4 sequence_parallel=true", 2, 4),
        (f"{TP}=4 {EP}=2 sequence_parallel=true moe_tp_extend_ep=true", 8, 1),
        (f"{TP}=4 sequence_parallel=true moe_tp_extend_ep=true", 4, 1),
    ],
)
def test_processes_that_share_the_experts_and_each_of_them(tmp_path, keys, expert, of_each):
    plan = plan_of(tmp_path, MIXTURE, 8, keys).train
    assert (plan.expert_parallel_size, plan.expert_tensor_parallel_size) == (expert, of_each)


def test_switches_of_a_layout_reach_the_plan(tmp_path):
    overlap = "use_distributed_optimizer=true overlap_grad_reduce=true overlap_param_gather=true"
    plan = plan_of(tmp_path, DENSE, 2, f"{TP}=2 sequence_parallel=true recompute_granularity=selective {overlap}").train
    assert (plan.sequence_parallel, plan.recompute) == (True, "selective")
    assert (plan.optimizer.overlap_grad_reduce, plan.optimizer.overlap_param_gather) == (True, True)
    of_model_file = plan_of(tmp_path, DENSE, 1, "", "model={text_decoder: {recompute_granularity: selective}}").train
    assert of_model_file.recompute == "selective"


def test_experts_of_the_rollout_engine_are_dealt_out_over_tensor_parallel_groups(tmp_path):
    given = ["enable_expert_parallel=true", "infer_tensor_parallel_size=4", "infer_expert_parallel_size=8"]
    plan = plan_of(tmp_path, MIXTURE, 128, "", *(f"generate_config.{key}" for key in given)).rollout
    assert (plan.expert_parallel, plan.tensor_parallel_size, plan.data_parallel_size, plan.num_ranks) == (True, 4, 8, 32)


def test_the_critic_has_a_layout_of_its_own(tmp_path):
    critic = [f"critic_config.{PP}=2", f"critic_config.{VPP}=2", f"critic_config.{CP}=2", "critic_config.context_parallel_algo=all_gather"]
    further = ["megatron_training.stage=ray_ppo", f"model={{text_decoder: {{pipeline_num_layers: {[7] * 4}}}}}"]
    plan = plan_of(tmp_path, DENSE, 4, f"{PP}=4", *critic, *further)
    assert plan.train.pipeline_layers == ((7, 7, 7, 7),)
    assert plan.critic.pipeline_layers == ((7, 7), (7, 7))
    assert (plan.critic.context_parallel_size, plan.critic.context_parallel_algorithm) == (2, "all_gather")
    with pytest.raises(ValueError, match=r"critic_config.tensor_model_parallel_size \(8\) must divide"):
        plan_of(tmp_path, DENSE, 8, "", "megatron_training.stage=ray_ppo", f"critic_config.{TP}=8")


DENSE_REFUSED = {
    f"4 {TP}=3": (
        "rl_config.actor_resource.num_npus (4) must be a multiple of actor_config's tensor x pipeline x context parallel sizes "
        "(3 x 1 x 1 = 3); num_npus 3 or 6 would do, or sizes whose product is 1, 2 or 4"
    ),
    f"2 {TP}=2 {PP}=2": (
        "rl_config.actor_resource.num_npus (2) must be a multiple of actor_config's tensor x pipeline x context parallel sizes "
        "(2 x 2 x 1 = 4); num_npus 4 would do, or sizes whose product is 1 or 2"
    ),
    f"8 {TP}=8": (
        "actor_config.tensor_model_parallel_size (8) must divide num_attention_heads (28) and num_key_value_heads (4) of "
        "{hf}/config.json; 1, 2 or 4 would do"
    ),
    "1 sequence_parallel=true": (
        "actor_config.sequence_parallel (true) needs actor_config.tensor_model_parallel_size > 1, which is 1; set sequence_parallel to "
        "false"
    ),
    "2 overlap_param_gather=true": (
        "actor_config.overlap_param_gather (true) needs actor_config.use_distributed_optimizer (true), which is false: without it every "
        "process has all parameters already; set one to the other"
    ),
    f"2 {EP}=2": (
        "actor_config.expert_model_parallel_size (2) needs a mixture of experts, which {hf}/config.json isn't; set it to 1 (and "
        "moe_tp_extend_ep to false)"
    ),
    f"8 {TP}=2 {CP}=4": (
        "actor_config.context_parallel_size (4) must divide num_attention_heads / tensor_model_parallel_size (28 / 2 = 14), and divide or "
        "be a multiple of the key/value heads left (2), with ulysses_cp_algo; 1, 2 or 14 would do, or any size with "
        "actor_config.context_parallel_algo megatron_cp_algo"
    ),
    f"30 {PP}=30": "actor_config.pipeline_model_parallel_size (30) must be <= the model's 28 layers; lower it",
    f"2 {PP}=2 num_layer_list=14,13": (
        "actor_config.num_layer_list [14, 13] sums to 27, but the model has 28 layers; '14,14' would do"
    ),
    f"3 {PP}=3 num_layer_list=14,14": (
        "actor_config.num_layer_list [14, 14]: it must have one number for each of actor_config.pipeline_model_parallel_size (3); "
        "'10,9,9' would do"
    ),
    f"2 {PP}=2 num_layer_list=28,0": (
        "actor_config.num_layer_list [28, 0] must give every stage at least one layer; '14,14' would do"
    ),
    f"2 {PP}=2 num_layer_list=14,x": (
        "actor_config.num_layer_list.1: 'x' isn't allowed; it must be a valid integer, unable to parse string as an integer"
    ),
    f"2 {PP}=2 {PIECE}=3": (
        "actor_config.num_layers_per_virtual_pipeline_stage (3) x actor_config.pipeline_model_parallel_size (2) = 6 must divide the "
        "model's 28 layers; a product of 1, 2, 4, 7, 14 or 28 would do"
    ),
    f"2 {PP}=2 {VPP}=3": (
        "actor_config.pipeline_model_parallel_size (2) x actor_config.virtual_pipeline_model_parallel_size (3) = 6 must divide the "
        "model's 28 layers; a product of 1, 2, 4, 7, 14 or 28 would do, or model: text_decoder.pipeline_num_layers by virtual stage"
    ),
    f"2 {PP}=2 {VPP}=2 {PIECE}=2": (
        "actor_config.num_layers_per_virtual_pipeline_stage (2) makes 7 virtual stages, but "
        "actor_config.virtual_pipeline_model_parallel_size is 2; remove one of them"
    ),
    f"1 {VPP}=2": (
        "actor_config.virtual_pipeline_model_parallel_size (2) needs actor_config.pipeline_model_parallel_size > 1, which is 1: virtual "
        "stages alternate over pipeline ranks; remove it, or set pipeline_model_parallel_size to 2 or more"
    ),
    f"1 {PIECE}=14": (
        "actor_config.num_layers_per_virtual_pipeline_stage (14) needs actor_config.pipeline_model_parallel_size > 1, which is 1: virtual "
        "stages alternate over pipeline ranks; remove it, or set pipeline_model_parallel_size to 2 or more"
    ),
    f"2 {PP}=2 {VPP}=2 num_layer_list=14,14": (
        "actor_config.num_layer_list [14, 14] is 1 virtual stage(s), but actor_config asks for 2 (virtual_pipeline_model_parallel_size); "
        "remove one of them"
    ),
}  # fmt: skip
MIXTURE_REFUSED = {
    f"8 {TP}=2": (
        "actor_config.sequence_parallel (false) must be true for a mixture of experts with actor_config.tensor_model_parallel_size (2) > 1"
        ", as every process would route every token otherwise; set it to true"
    ),
    f"12 {EP}=8": (
        "actor_config.expert_model_parallel_size (8) x actor_config.expert_tensor_parallel_size (1) = 8 must divide the 12 processes of a "
        "pipeline stage (rl_config.actor_resource.num_npus 12 / pipeline_model_parallel_size 1); 1, 2, 3, 4, 6 or 12 would do"
    ),
    f"8 {PP}=2 {EP}=8": (
        "actor_config.expert_model_parallel_size (8) x actor_config.expert_tensor_parallel_size (1) = 8 must divide the 4 processes of a "
        "pipeline stage (rl_config.actor_resource.num_npus 8 / pipeline_model_parallel_size 2); 1, 2 or 4 would do"
    ),
    f"12 {EP}=6": (
        "actor_config.expert_model_parallel_size (6) must divide the 128 experts of {hf}/config.json; 1, 2 or 4 would do"
    ),
    f"4 {TP}=4 {ETP}=1 sequence_parallel=true": (
        "actor_config.expert_tensor_parallel_size (1) must be actor_config.tensor_model_parallel_size (4) while "
        "actor_config.expert_model_parallel_size is 1, or gradients of the experts would be wrong; remove it, or set moe_tp_extend_ep to "
        "true"
    ),
    f"10 {EP}=2 {ETP}=5": (
        "actor_config.expert_tensor_parallel_size (5) must divide moe_intermediate_size (768) of {hf}/config.json; 1, 2, 3, 4, 6, 8, 12, "
        "16, 24, 32, 48, 64, 96, 128, 192, 256, 384 or 768 would do"
    ),
    f"4 {TP}=2 {EP}=2 {ETP}=2 moe_tp_extend_ep=true sequence_parallel=true": (
        "actor_config.moe_tp_extend_ep (true) keeps experts whole, but actor_config.expert_tensor_parallel_size is 2; set it to 1, or "
        "moe_tp_extend_ep to false"
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "case", "sentence"),
    [(config, *item) for config, table in ((DENSE, DENSE_REFUSED), (MIXTURE, MIXTURE_REFUSED)) for item in table.items()],
    ids=[*DENSE_REFUSED, *MIXTURE_REFUSED],
)
def test_a_layout_that_does_not_fit_is_refused_with_both_values_and_what_would_do(tmp_path, config, case, sentence):
    devices, keys = case.split(" ", 1)
    with pytest.raises(ValueError) as error:
        plan_of(tmp_path, config, int(devices), keys)
    assert str(error.value) == sentence.format(hf=tmp_path)


@pytest.mark.parametrize(
    ("split", "keys", "sentence"),
    [
        ("[[14],[14]]", "", "is 2 virtual stages, which need actor_config.pipeline_model_parallel_size > 1, which is 1; give one list"),
        ("[[7,7],[14]]", f"{PP}=2", "each list must have one number for each of actor_config.pipeline_model_parallel_size (2); change it"),
        ("[12,16]", f"{PP}=4", "it must have one number for each of actor_config.pipeline_model_parallel_size (4); '7,7,7,7' would do"),
        ("[[7,7],[7,7]]", f"{PP}=2 {VPP}=7", "is 2 virtual stage(s), but actor_config asks for 7"),
    ],
)
def test_a_split_of_the_model_file_that_does_not_fit(tmp_path, split, keys, sentence):
    with pytest.raises(ValueError) as error:
        plan_of(tmp_path, DENSE, 4, keys, f"model={{text_decoder: {{pipeline_num_layers: {split}}}}}")
    assert str(error.value).startswith("model: text_decoder.pipeline_num_layers [") and sentence in str(error.value)


@pytest.mark.parametrize(("split", "stages"), [([28], None), ([[28]], None), ([16, 12], ((16, 12),)), ([[28, 0]], ((28, 0),))])
def test_all_layers_in_one_stage_of_the_model_file_leave_the_split_to_the_sizes_of_training_and_conversion(tmp_path, split, stages):
    """stages: those that a conversion to two pipeline ranks must have."""
    (tmp_path / "model.json").write_text(json.dumps({"text_decoder": {"pipeline_num_layers": split}}))
    yaml = tmp_path / "training.yaml"
    yaml.write_text("model: model.json\nactor_config: {pipeline_model_parallel_size: 2}\n")
    check_training_yaml(yaml, Layout(text=stages or ((14, 14),)), "actor_config", vision_alone=False)
    if stages is not None:
        with pytest.raises(ValueError, match=r"pipeline_num_layers of its model is .*, but the conversion has"):
            check_training_yaml(yaml, Layout(text=((14, 14),)), "actor_config", vision_alone=False)
    elif split == [28]:
        assert plan_of(tmp_path, DENSE, 2, f"{PP}=2", "model={text_decoder: {pipeline_num_layers: [28]}}").train.pipeline_layers == ()


def test_virtual_stages_need_to_know_the_layers(tmp_path):
    with pytest.raises(ValueError, match="needs the model's number of layers, but .* names no folder with a config.json"):
        plan_of(tmp_path, None, 2, f"{PP}=2 {VPP}=2")


def test_sizes_that_the_model_does_not_have_are_not_asked_for(tmp_path):
    """Every layer of this mixture has experts, so its intermediate_size isn't cut; latent attention has no heads of keys to cut."""
    assert plan_of(tmp_path, MIXTURE, 4, f"{TP}=4 sequence_parallel=true").train.tensor_parallel_size == 4
    few_heads_of_keys = LATENT | {"num_key_value_heads": 3}
    assert plan_of(tmp_path, few_heads_of_keys, 8, f"{TP}=4 {CP}=2 sequence_parallel=true").train.context_parallel_size == 2
    with pytest.raises(ValueError, match=r"must divide n_shared_experts x moe_intermediate_size \(2050\)"):
        plan_of(tmp_path, LATENT | {"moe_intermediate_size": 2050}, 4, f"{TP}=4 sequence_parallel=true")
    with pytest.raises(ValueError, match=r"must divide intermediate_size \(18434\)"):
        plan_of(tmp_path, LATENT | {"intermediate_size": 18434}, 4, f"{TP}=4 sequence_parallel=true")


EXAMPLES = (Path(__file__).parents[2] / "docs/parallelism.md").read_text().split("```yaml")[1:]
MODEL_OF_EXAMPLE = {
    "Qwen2.5-VL-7B": DENSE | {"vision_config": {"num_heads": 16, "intermediate_size": 3420, "hidden_size": 1280}},
    "Qwen2.5-VL-32B": {"num_hidden_layers": 64, "hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40,
                       "num_key_value_heads": 8, "vocab_size": 152064,
                       "vision_config": {"num_heads": 16, "intermediate_size": 3456, "hidden_size": 1280}},
    "Qwen3-30B-A3B": MIXTURE,
}  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES, ids=MODEL_OF_EXAMPLE)
def test_examples_of_the_guide_fit_their_models(tmp_path, example):
    text = example.split("```")[0]
    model = next(model for model in MODEL_OF_EXAMPLE if f"# {model}:" in text)
    (tmp_path / "config.json").write_text(json.dumps(MODEL_OF_EXAMPLE[model]))
    whole = OmegaConf.merge(OmegaConf.create(BASE), OmegaConf.create(text))
    whole.megatron_training.tokenizer_name_or_path = str(tmp_path)
    OmegaConf.save(whole, tmp_path / "run.yaml")
    plan = make_plan(load_config(tmp_path / "run.yaml", ["generate_config.kv_cache_bytes=100000000000"]))
    train = plan.train
    assert not plan.run.num_devices % (train.tensor_parallel_size * train.pipeline_parallel_size)
    assert len(EXAMPLES) == len(MODEL_OF_EXAMPLE)
