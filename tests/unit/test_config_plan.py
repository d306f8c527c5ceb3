"""Rules over several keys and derived values, with the numbers worked out by hand."""

import json
import textwrap
from pathlib import Path

import pytest

from mindspeed_mm_rl.config.derive import make_plan
from mindspeed_mm_rl.config.load import load_config
from tests.unit.test_config_load import CONFIGS, DAPO_7B, USERS_COLOCATED, USERS_DAPO, USERS_RESUME, write

BASE = """
megatron_training:
  stage: ray_dapo
  tokenizer_name_or_path: model
  data_path: data
  global_batch_size: 64
  train_iters: 80
rl_config:
  n_samples_per_prompt: 8
"""


def plan_of(folder: Path, *overrides: str, text: str = BASE):
    return make_plan(load_config(write(folder, text), overrides))


def merged(folder: Path, text: str) -> Path:
    """The user's fragment over the shipped file, as an editor would leave it."""
    from omegaconf import OmegaConf

    whole = OmegaConf.merge(OmegaConf.load(DAPO_7B), OmegaConf.create(textwrap.dedent(text)))
    OmegaConf.save(whole, folder / "merged.yaml")
    return folder / "merged.yaml"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_yaml_makes_a_plan(path):
    assert make_plan(load_config(path)).run.train_iters > 0


# algorithm, prompts, mini-batch, samples, tensor x pipeline, devices, rollout's tensor parallel, prompt, response, verifier, KL
SETTINGS_THAT_USERS_KNOW = {
    "grpo_trainer_qwen25_7b": ("grpo", 32, 32, 8, 2, 2, 16, 1, 2048, 2048, "math_17k_acc", 0.001),
    "grpo_trainer_qwen3_8b": ("grpo", 32, 32, 8, 2, 2, 16, 1, 2048, 8192, "base_acc", 0.01),
    "dapo_trainer_qwen25_32b": ("dapo", 32, 32, 8, 8, 1, 16, 8, 2048, 2048, "acc_for_dapo", 0.0),
    "ppo_trainer_qwen25_32b": ("ppo", 128, 128, 8, 8, 1, 32, 8, 2048, 2048, "acc_for_ppo", 0.0),
}


@pytest.mark.parametrize("name", SETTINGS_THAT_USERS_KNOW)
def test_text_yamls_have_the_settings_that_users_know(name):
    plan = make_plan(load_config(CONFIGS / f"{name}.yaml"))
    run, train, rollout = plan.run, plan.train, plan.rollout
    assert SETTINGS_THAT_USERS_KNOW[name] == (
        plan.recipe.algorithm, run.prompts_per_generation, run.mini_batch_prompts, run.samples_per_prompt, train.tensor_parallel_size,
        train.pipeline_parallel_size, run.num_devices, rollout.tensor_parallel_size, plan.data.max_prompt_length, rollout.max_tokens,
        *plan.reward.verifiers, plan.recipe.kl_coef,
    )  # fmt: skip
    assert (train.optimizer.lr, train.recompute, run.on_policy) == (1e-6, "full", True)
    if plan.critic is not None:
        critic = plan.critic
        assert (critic.optimizer.lr, critic.tensor_parallel_size, critic.recompute, plan.recipe.lam) == (5e-6, 8, "full", 1.0)


@pytest.mark.parametrize("text", [USERS_DAPO, USERS_RESUME])
def test_users_fragments_make_a_plan(tmp_path, text):
    assert make_plan(load_config(merged(tmp_path, text))).run.train_iters > 0


def test_users_dapo_values_in_the_plan(tmp_path):
    plan = make_plan(load_config(merged(tmp_path, USERS_DAPO)))
    assert plan.train.deterministic
    assert (plan.recipe.clip_ratio_low, plan.recipe.clip_ratio_high, plan.recipe.kl_coef) == (0.2, 0.28, 0.0)
    assert (plan.recipe.train_prompts, plan.recipe.filter_max_batches) == (32, -1)
    assert (plan.run.prompts_per_generation, plan.run.mini_batch_prompts, plan.run.on_policy) == (64, 32, True)
    assert plan.reward.overlong_buffer == 512
    assert plan.train.load == str(Path("ckpt/mm_path/Qwen2.5-VL-7B-Instruct").absolute())


def test_users_layouts_of_actor_and_vision_workers(tmp_path):
    """The model file has all 28 layers in one stage: with four, each has seven."""
    plan = make_plan(load_config(merged(tmp_path, USERS_COLOCATED)))
    assert (plan.train.tensor_parallel_size, plan.train.pipeline_parallel_size, plan.train.pipeline_layers) == (4, 4, ())
    assert (plan.run.num_devices, plan.vision.tensor_parallel_size, plan.train.with_vision) == (16, 1, False)


def test_updates_and_warmup(tmp_path):
    # 64 prompts / 24 = 3 mini-batches, the last one smaller; x 2 epochs x 80 iterations.
    plan = plan_of(tmp_path, "rl_config.mini_batch_size=24", "rl_config.epochs=2", "actor_config.lr_warmup_fraction=0.05")
    assert plan.train.optimizer.decay_updates == 480
    assert plan.train.optimizer.warmup_updates == 24


@pytest.mark.parametrize(
    ("overrides", "on_policy"),
    [
        ([], True),
        (["rl_config.mini_batch_size=32"], False),
        (["rl_config.epochs=2"], False),
        (["rl_config.mini_batch_size=32", "rl_config.filter_groups_enable=true", "rl_config.filter_groups_train_batch_size=32"], True),
    ],
)
def test_on_policy_is_one_mini_batch_and_one_epoch(tmp_path, overrides, on_policy):
    assert plan_of(tmp_path, *overrides).run.on_policy is on_policy


def test_grpo_is_dapo_with_equal_clips_and_a_reference(tmp_path):
    recipe = plan_of(tmp_path, "megatron_training.stage=ray_grpo").recipe
    assert (recipe.algorithm, recipe.clip_ratio_low, recipe.clip_ratio_high, recipe.kl_coef) == ("grpo", 0.2, 0.2, 0.01)


def test_a_stage_has_the_defaults_of_its_paper_and_says_so(tmp_path):
    plan = plan_of(tmp_path, "megatron_training.stage=ray_gspo")
    assert (plan.recipe.algorithm, plan.recipe.clip_ratio_low, plan.recipe.clip_ratio_high, plan.recipe.kl_coef) == (
        "gspo",
        3e-4,
        4e-4,
        0.0,
    )
    assert any("clip_ratio_high: 0.0004" in note and "ray_gspo" in note for note in plan.notes)
    own = plan_of(tmp_path, "megatron_training.stage=ray_gspo", "rl_config.clip_ratio=0.1", "rl_config.init_kl_coef=0.5").recipe
    assert (own.clip_ratio_low, own.clip_ratio_high, own.kl_coef) == (0.1, 0.1, 0.5)
    assert plan_of(tmp_path, "megatron_training.stage=ray_dr_grpo").recipe.loss_length == 2048
    unused = plan_of(tmp_path, "megatron_training.stage=ray_rloo", "rl_config.use_kl_in_reward=false").notes
    assert "rl_config: use_kl_in_reward isn't used: ray_rloo decides it (arXiv 2402.14740)" in unused
    assert plan_of(tmp_path, "megatron_training.stage=ray_reinforce_plus_plus_baseline").recipe.kl_penalty == "mse"


@pytest.mark.parametrize("stage", ["ray_ppo", "ray_reinforce_plus_plus"])
def test_one_sample_per_prompt_is_enough_where_samples_are_not_compared(tmp_path, stage):
    plan = plan_of(tmp_path, f"megatron_training.stage={stage}", "rl_config.n_samples_per_prompt=1")
    assert plan.run.samples_per_prompt == 1


def test_dapo_says_that_it_has_no_kl_term(tmp_path):
    plan = plan_of(tmp_path, "rl_config.init_kl_coef=0.05")
    assert plan.recipe.kl_coef == 0.0
    assert any("init_kl_coef" in note for note in plan.notes)


def test_evaluation_is_a_section(tmp_path):
    assert plan_of(tmp_path).eval is None
    penalty = ["rl_config.overlong_buffer_enable=true", "rl_config.overlong_buffer=512"]
    verifiers = ["rl_config.verifier_function=[acc,format]", "rl_config.verifier_weight=[0.9,0.1]"]
    plan = plan_of(tmp_path, "eval.data_path=test.parquet", "megatron_training.save_interval=20", *penalty, *verifiers)
    assert plan.eval.data == (str(Path("test.parquet").absolute()),)
    assert (plan.eval.interval, plan.eval.at_start, plan.eval.samples_per_prompt, plan.eval.temperature) == (20, False, 1, 0.0)
    assert (plan.eval.reward.verifiers, plan.eval.reward.weights) == (plan.reward.verifiers, plan.reward.weights)
    assert (plan.reward.overlong_buffer, plan.eval.reward.overlong_buffer) == (512, 0)
    several = ["eval.data_path=[a.jsonl,b]", "eval.n_samples_per_prompt=4", "generate_config.sampling_config.temperature=0.8"]
    plan = plan_of(tmp_path, *several, "eval.interval=5", "eval.verifier_function=math_17k_acc")
    assert [Path(path).name for path in plan.eval.data] == ["a.jsonl", "b"]
    assert (plan.eval.interval, plan.eval.temperature, plan.eval.reward.verifiers) == (5, 0.8, ("math_17k_acc",))
    assert plan_of(tmp_path, *several, "eval.temperature=1").eval.temperature == 1.0


def test_evaluation_asks_no_reward_model(tmp_path):
    """A source that only a model scores is graded as all others are."""
    sources = "rl_config.verifier_by_source={chat: {reward_model: 1.0}, math: {math_17k_acc: 0.5}}"
    verifiers = ["rl_config.verifier_function=[acc,reward_model]", "rl_config.verifier_weight=[1,2]", "rl_config.reward_model=rm"]
    plan = plan_of(tmp_path, "eval.data_path=a", *verifiers, sources)
    assert (plan.eval.reward.verifiers, plan.eval.reward.weights, plan.eval.reward.reward_model) == (("acc",), (1.0,), "")
    assert plan.eval.reward.by_source == (("math", ("math_17k_acc",), (0.5,)),)


def test_lengths_are_derived(tmp_path):
    plan = plan_of(tmp_path, "rl_config.max_prompt_length=3000", "generate_config.sampling_config.max_tokens=100")
    assert plan.rollout.max_model_len == plan.rollout.max_num_batched_tokens == 3100


def test_dtype_follows_bf16(tmp_path):
    assert plan_of(tmp_path).rollout.dtype == plan_of(tmp_path).train.dtype == "bfloat16"
    plan = plan_of(tmp_path, "megatron_training.bf16=false")
    assert (plan.train.dtype, plan.rollout.dtype, plan.train.logprob_gap_bound) == ("float32", "float32", 0.1)


def test_micro_batch_bounds(tmp_path):
    samples = ["actor_config.micro_batch_size=4", "rl_config.update_max_packing_token_size=8000"]
    plan = plan_of(tmp_path, *samples)
    assert (plan.train.max_samples_per_micro_batch, plan.train.max_tokens_per_micro_batch) == (4, 8000)
    assert plan_of(tmp_path, *samples, "rl_config.use_dynamic_bsz=true").train.max_samples_per_micro_batch == 0


def test_seed_of_sampling(tmp_path):
    assert plan_of(tmp_path, "megatron_training.seed=7").rollout.seed == 7
    assert plan_of(tmp_path, "megatron_training.seed=7", "generate_config.sampling_config.seed=0").rollout.seed == 0


def test_actor_config_overrides_keys_of_the_run_too(tmp_path):
    changes = {"train_iters": 7, "global_batch_size": 32, "seed": 5, "stage": "ray_grpo", "data_path": "/other", "max_pixels": 600000}
    plan = plan_of(tmp_path, *(f"actor_config.{key}={value}" for key, value in changes.items()))
    assert (plan.run.train_iters, plan.run.prompts_per_generation, plan.recipe.algorithm) == (7, 32, "grpo")
    assert (plan.run.seed, plan.train.seed, plan.data.seed, plan.rollout.seed) == (5, 5, 5, 5)
    assert plan.data.train_path == "/other"
    assert {part.max_pixels for part in (plan.data, plan.train, plan.rollout)} == {600000}


def test_output_is_named_after_the_yaml(tmp_path):
    assert Path(plan_of(tmp_path).run.output).parts[-2:] == ("logs", "run")


def test_text_and_pictures_have_their_own_default_reward(tmp_path):
    assert plan_of(tmp_path).reward.verifiers == ("base_acc",)
    assert plan_of(tmp_path, "model=examples/rl/model/qwen2.5vl_7b.json").reward.verifiers == ("geo3k",)


BROKEN_RULES = [
    (["megatron_training.train_iters=null"], "megatron_training.train_iters is missing"),
    (["megatron_training.stage=ray_ppo", "rl_config.use_kl_in_reward=true"], r"use_kl_in_reward \(true\) needs rl_config.init_kl_coef > 0"),
    (["rl_config.use_kl_in_reward=true"], "ray_dapo has no KL term; set use_kl_in_reward to false"),
    (["rl_config.adv_estimator=gae"], r"adv_estimator \(gae\) must be group_norm for megatron_training.stage ray_dapo"),
    (["megatron_training.stage=ray_ppo", "rl_config.adv_estimator=group_norm"], r"\(group_norm\) must be gae"),
    (
        ["megatron_training.stage=ray_reinforce_plus_plus", "rl_config.n_samples_per_prompt=1", "rl_config.filter_groups_enable=true"],
        "filter_groups_enable drops groups without differences of a prompt",
    ),
    (["generate_config.max_model_len=2559"], r"max_model_len \(2559\) must be >= .*\(512\) \+ .*\(2048\) = 2560"),
    (["rl_config.n_samples_per_prompt=1"], r"n_samples_per_prompt \(1\) must be >= 2"),
    (["rl_config.mini_batch_size=65"], r"\(65 prompts\) must be <= megatron_training.global_batch_size \(64"),
    (
        ["rl_config.filter_groups_enable=true", "rl_config.filter_groups_train_batch_size=129", "rl_config.filter_groups_max_batches=2"],
        r"filter_groups_max_batches \(2\) x .*global_batch_size \(64\) = 128 .*filter_groups_train_batch_size \(129",
    ),
    (["generate_config.dtype=float32"], r"dtype \(float32\) must be bfloat16, as bf16 is true"),
    (["actor_config.min_lr=1"], r"min_lr \(1.0\) must be <= actor_config.lr \(1e-06\)"),
    (["megatron_training.min_pixels=99999999"], "must be <= megatron_training.max_pixels"),
    (["rl_config.verifier_function=[acc,format]", "rl_config.verifier_weight=[1.0]"], "give one weight each"),
    (["rl_config.verifier_function=[]"], "verifier_function is empty"),
    (["rl_config.overlong_buffer_enable=true", "rl_config.rollout_max_tokens=9"], r"rollout_max_tokens \(9\) must equal .*\(2048\)"),
    (["rl_config.overlong_buffer_enable=true"], r"overlong_buffer \(0\) must be > 0"),
    (["rl_config.clip_higher_enable=true", "rl_config.clip_ratio_low=0.3"], r"clip_ratio_low \(0.3\) must be <= rl_config.clip_ratio_high"),
    (
        ["megatron_training.stage=ray_cispo", "rl_config.clip_ratio_high=3"],
        r"clip_ratio_high \(3.0\) would not be used, as rl_config.clip_higher_enable is not given; set clip_higher_enable to true, or",
    ),
    (["rl_config.overlong_buffer=512"], "overlong_buffer .512. would not be used, as rl_config.overlong_buffer_enable"),
    (
        ["rl_config.filter_groups_metric=acc"],
        "filter_groups_metric .acc. would not be used, as rl_config.filter_groups_enable",
    ),
    (["actor_config.tensor_model_parallel_size=2"], r"num_npus \(1\) must be a multiple of .*2 x 1 x 1 = 2"),
    (["actor_config.sequence_parallel=true"], "needs actor_config.tensor_model_parallel_size > 1, which is 1"),
    (["rl_config.runtime_env_path=nowhere.yaml"], "rl_config.runtime_env_path: nowhere.yaml doesn't exist"),
]


@pytest.mark.parametrize(("overrides", "message"), BROKEN_RULES)
def test_a_broken_rule_names_keys_and_values(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        plan_of(tmp_path, *overrides)


def hf_folder(folder: Path, **changes) -> Path:
    """config.json of Qwen2.5-VL-7B as transformers 4 wrote it."""
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
    }  # fmt: skip
    config = {
        "model_type": "qwen2_5_vl", "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "rope_theta": 1000000.0, "rms_norm_eps": 1e-06, "image_token_id": 151655,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vision_config": vision,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_the_shipped_model_file_agrees_with_config_json(tmp_path):
    plan = make_plan(load_config(DAPO_7B, [f"megatron_training.tokenizer_name_or_path={hf_folder(tmp_path / 'hf')}"]))
    assert plan.rollout.image_embeds and plan.train.freeze_vision and plan.train.freeze_projector


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 36}, "text_decoder.num_layers is 28, but num_hidden_layers in .* is 36; config.json decides"),
        ({"rope_scaling": {"mrope_section": [8, 12, 12]}}, r"mrope_section is \[16, 24, 24\], but .* is \[8, 12, 12\]"),
        ({"text_config": {"hidden_size": 2048}}, "text_decoder.hidden_size is 3584, but hidden_size in .* is 2048"),
        ({"image_token_id": 5}, "model.image_token_id is 151655, but image_token_id in .* is 5"),
    ],
)
def test_a_model_file_of_another_model_is_an_error_with_both_values(tmp_path, changes, message):
    folder = hf_folder(tmp_path / "hf", **changes)
    with pytest.raises(ValueError, match=message):
        make_plan(load_config(DAPO_7B, [f"megatron_training.tokenizer_name_or_path={folder}"]))


def test_rope_that_the_yaml_alone_stretches_is_an_error(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    asked = [f"megatron_training.tokenizer_name_or_path={folder}", "megatron_training.rope_scaling_factor=4"]
    with pytest.raises(ValueError, match=r"megatron_training.rope_scaling_factor is 4, but factor in .* is 1.0; config.json decides"):
        make_plan(load_config(DAPO_7B, asked))
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "mrope_section": [16, 24, 24]}
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | {"rope_scaling": scaling}))
    make_plan(load_config(DAPO_7B, asked))


def test_a_width_that_no_layer_has_is_not_compared(tmp_path):
    # Files for mixtures of experts name an MLP that only dense layers would have; those of the reference system have another number there.
    folder = hf_folder(tmp_path / "hf", num_experts=128, moe_intermediate_size=768)
    write = f"megatron_training.tokenizer_name_or_path={folder} megatron_training.ffn_hidden_size=8192 model={{}}".split()
    make_plan(load_config(DAPO_7B, [*write, "actor_config.sequence_parallel=true"]))
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | {"mlp_only_layers": [0]}))
    with pytest.raises(ValueError, match="megatron_training.ffn_hidden_size is 8192, but intermediate_size in .* is 18944"):
        make_plan(load_config(DAPO_7B, [*write, "actor_config.sequence_parallel=true"]))


def test_a_pipeline_split_of_another_depth_is_an_error(tmp_path):
    model = json.loads((CONFIGS.parent / "model/qwen2.5vl_7b.json").read_text())
    model["text_decoder"]["pipeline_num_layers"] = [12, 12]
    (tmp_path / "model.json").write_text(json.dumps(model))
    with pytest.raises(ValueError, match=r"pipeline_num_layers \[12, 12\] sums to 24, but .* has 28 layers"):
        hf_path = f"megatron_training.tokenizer_name_or_path={hf_folder(tmp_path / 'hf')}"
        make_plan(load_config(DAPO_7B, [hf_path, f"model={tmp_path}/model.json"]))


@pytest.mark.parametrize(("content", "message"), [("{", "config.json is not valid JSON"), ("[]", "config.json holds a list")])
def test_a_damaged_config_json_is_named(tmp_path, content, message):
    folder = hf_folder(tmp_path / "hf")
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"{folder}/{message}"):
        plan_of(tmp_path, f"megatron_training.tokenizer_name_or_path={folder}")


def test_a_trainable_encoder_is_sent_pixels(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({"image_encoder": {"vision_encoder": {"freeze": False}}}))
    plan = plan_of(tmp_path, f"model={tmp_path}/model.json")
    assert not plan.train.freeze_vision and plan.train.freeze_projector and not plan.rollout.image_embeds
    assert plan_of(tmp_path, "model={image_encoder: {vision_encoder: {freeze: null}}}").train.freeze_vision  # null = the default
