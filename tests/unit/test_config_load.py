"""What users write: which files load, and what each kind of mistake says."""

import textwrap
from pathlib import Path

import pytest
import yaml

from mindspeed_mm_rl.config import known_keys
from mindspeed_mm_rl.config.load import load_config
from mindspeed_mm_rl.config.schema import GenerateConfig, MegatronConfig, RLConfig
from mindspeed_mm_rl.config.spellings import SPELLINGS

CONFIGS = Path(__file__).parents[2] / "examples/rl/configs"
DAPO_7B = CONFIGS / "dapo_trainer_qwen25vl_7b.yaml"

USERS_DAPO = """
model: examples/rl/model/qwen2.5vl_7b.json
megatron_training:
  tokenizer_name_or_path: ckpt/hf_path/Qwen2.5-VL-7B-Instruct
  data_path: /path/data/geometry3k
  use_deter_comp: true
actor_config:
  load: ckpt/mm_path/Qwen2.5-VL-7B-Instruct
  save: ./ckpt
vit_config:
  load: ckpt/mm_path/Qwen2.5-VL-7B-Vit-Instruct
generate_config:
  trust_remote_code: true
rl_config:
  token_level_loss: true
  clip_higher_enable: true
  clip_ratio_low: 0.2
  clip_ratio_high: 0.28
  overlong_buffer_enable: true
  rollout_max_tokens: 2048
  overlong_buffer: 512
  overlong_buffer_penalty_factor: 1.0
  filter_groups_enable: true
  filter_groups_metric: acc_for_dapo
  filter_groups_max_batches: -1
  filter_groups_train_batch_size: 32
"""
USERS_COLOCATED = """
rl_config:
  use_integrated_worker: true
  colocate_actor_and_vit: true
  actor_resource:
    num_npus: 16
  vit_resource:
    num_npus: 16
actor_config:
  tensor_model_parallel_size: 4
  pipeline_model_parallel_size: 4
vit_config:
  tensor_model_parallel_size: 1
  pipeline_model_parallel_size: 1
"""
USERS_RESUME = """
actor_config:
  finetune: false
  load: ./ckpt-32b
  save: ./ckpt
  no_load_optim: false
  no_load_rng: false
rl_config:
  integrated_mode_config:
    ref_model_load_path: ./Qwen2.5-32-tp8
"""
# A whole file as the reference system's examples have it: keys of every kind, some of them respelled.
USERS_WHOLE = """
model: examples/rl/model/qwen2.5vl_7b.json
megatron_training:
  model: qwen2.5vl_7b
  use_fused_rmsnorm: true
  normalization: RMSNorm
  use_mcore_models: true
  sequence_parallel: false
  use_flash_attn: true
  no_masked_softmax_fusion: true
  attention_softmax_in_fp32: true
  swiglu: true
  position_embedding_type: rope
  bf16: true
  tokenizer_type: PretrainedFromHF
  tokenizer_name_or_path: /path/Qwen2.5-VL-7B-Instruct
  global_batch_size: 512
  seq_length: 1024
  save_interval: 50
  train_iters: 1000
  stage: ray_grpo
  attention_dropout: 0.0
  hidden_dropout: 0.0
  init_method_std: 0.01
  distributed_backend: nccl
  variable_seq_lengths: true
  dataset_additional_keys: ['input_ids', 'position_ids']
  data_path: /path/rl_data
  split: 100,0,0
  no_shuffle: true
  use_deter_comp: false
actor_config:
  model: qwen2.5vl_7b
  micro_batch_size: 1
  lr: 1e-6
  lr_decay_style: constant
  min-lr: 0.0
  lr_warmup_fraction: 0.0
  finetune: true
  load: /path/qwen2_5_vl_7b
  num_workers: 8
rl_config:
  is_multimodal: true
  guarantee_order: true
  blocking: true
  gamma: 1.0
  use_dynamic_bsz: true
  max_packing_token_size: [55000, 8000]
  vit_forward_micro_batch_size: 64
  reward_dispatch_size: 5
  mini_batch_size: 32
  max_prompt_length: 1024
  entropy_coeff: 0
  n_samples_per_prompt: 5
  rule_reward: true
  verifier_function: ["base_acc"]
  verifier_weight: [1.0]
  num_cpus_for_local_task: 1.0
  use_tensorboard: false
  reuse_image_embeds: true
  actor_resource:
    num_npus: 8
generate_config:
  offload_train_optimizer: true
  infer_tensor_parallel_size: 1
  infer_pipeline_parallel_size: 1
  max_model_len: 3072
  dtype: "bfloat16"
  sampling_config:
    logprobs: 0
    max_tokens: 2048
    top_p: 1.
    top_k: -1
    min_p: 0.0
    temperature: 1.0
    detokenize: false
    seed: 1234
"""


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


@pytest.mark.parametrize("text", [USERS_DAPO, USERS_COLOCATED, USERS_RESUME, USERS_WHOLE])
def test_users_files_load_unchanged(tmp_path, text):
    load_config(write(tmp_path, text))


def test_users_values_arrive(tmp_path):
    config = load_config(write(tmp_path, USERS_WHOLE))
    assert config.actor_config.lr == 1e-6
    assert config.actor_config.global_batch_size == 512  # what megatron_training says holds for the role
    assert config.rl_config.max_packing_token_size == 8000
    assert config.rl_config.actor_resource.num_npus == 8
    assert config.model["text_decoder"]["num_layers"] == 28
    assert config.architecture == {"normalization": "RMSNorm", "swiglu": True, "position_embedding_type": "rope"}


def test_each_accepted_key_is_said_once(tmp_path):
    notes = load_config(write(tmp_path, USERS_WHOLE)).notes
    for key in ("reward_dispatch_size", "guarantee_order", "reuse_image_embeds", "detokenize"):
        assert sum(key in note.replace(":", ",").replace(",", " ").split() for note in notes) == 1, key


@pytest.mark.parametrize(("spelling", "expected"), [("use_deter_comp", True), ("npu_deterministic", True), ("npu-deterministic", True)])
def test_spellings_of_determinism(tmp_path, spelling, expected):
    config = load_config(write(tmp_path, f"megatron_training:\n  {spelling}: true\n"))
    assert config.actor_config.npu_deterministic is expected


def test_overrides_win_over_the_file(tmp_path):
    path = write(tmp_path, "actor_config: {lr: 1e-6}\n")
    config = load_config(path, ["actor_config.lr=2.5e-4", "+rl_config.verifier_function=[acc,format]"])
    assert config.actor_config.lr == 2.5e-4
    assert config.rl_config.verifier_function == ("acc", "format")


def test_null_means_the_default(tmp_path):
    config = load_config(write(tmp_path, "actor_config: {weight_decay: null, no_load_optim: null}\nrl_config: null\n"))
    assert config.actor_config.weight_decay == MegatronConfig().weight_decay


def test_hydra_defaults_find_the_model_beside_the_yaml(tmp_path):
    (tmp_path / "model").mkdir()
    write(tmp_path / "model", "qwen25-7b:\n  num_layers: 28\n", "qwen25_7b.yaml")
    text = "defaults:\n  - model:\n      - qwen25_7b\nmegatron_training:\n  model: qwen25-7b\n"
    assert load_config(write(tmp_path, text)).model == {"num_layers": 28}


MISTAKES = [
    ("rl_config: {mini_batchsize: 3}", "unknown key rl_config.mini_batchsize; did you mean mini_batch_size?"),
    ("rl_confg: {}", "unknown section rl_confg; did you mean rl_config?"),
    ("generate_config: {sampling_config: {temprature: 1}}", "generate_config.sampling_config.temprature; did you mean temperature?"),
    ("rl_config: {actor_resource: {npus: 1}}", "unknown key rl_config.actor_resource.npus; did you mean num_npus?"),
    ("rl_config: {kl_penalty: low_var}", "choose kl, abs, mse, low_var_kl .did you mean low_var_kl"),
    ("rl_config: {kl_penalty: full}", "rl_config.kl_penalty: 'full' isn't allowed"),
    ("actor_config: {lr: fast}", "actor_config.lr: 'fast' isn't allowed"),
    ("rl_config: {n_samples_per_prompt: 0}", "must be greater than 0"),
    ("rl_config: 3", "rl_config must be a section"),
    ("- a", "must hold sections"),
    ("a: [1", "can't be read as YAML"),
    ("rl_config: {share_backbone: true}", "share_backbone: True isn't offered in this version; set it to false"),
    ("rl_config: {partial_rollout_max_split: 2}", "set it to 1"),
    ("generate_config: {sampling_config: {top_k: 50}}", "top_k: 50 isn't offered.*set it to -1"),
    ("generate_config: {sampling_config: {top_p: 0.9}}", "top_p: 0.9 isn't offered.*set it to 1"),
    ("megatron_training: {attention_dropout: 0.1}", "without dropout"),
    ("reward_config: {load: x}", "section reward_config isn't offered.*verifier_function"),
    ("model: no/such.json", "model: no/such.json doesn't exist .looked in"),
    (
        "profiler_config: {integrated: {stage: actor_generate}}",
        "integrated.stage.0: 'actor_generate' isn't allowed; it must be 'actor_compute_log_prob'",
    ),
    ("profiler_config: {profile: true}", "unknown key profiler_config.profile; did you mean profiler_config.integrated.profile?"),
    ("actor_config: {lr: .inf}", "actor_config.lr: inf isn't allowed; it must be a finite number"),
    ("rl_config: {verifier_weight: [.nan]}", "rl_config.verifier_weight.0: nan isn't allowed; it must be a finite number"),
    ("megatron_training: {seed: -1}", "megatron_training.seed: -1 isn't allowed; it must be greater than or equal to 0"),
    ("generate_config: {sampling_config: {seed: -1}}", "sampling_config.seed: -1 isn't allowed"),
    ("model: {image_encoder: {vision_encoder: {freze: false}}}", "unknown key model.*vision_encoder.freze; did you mean freeze?"),
    ("model: {image_encodr: {vision_encoder: {freeze: false}}}", "unknown key model.image_encodr; did you mean image_encoder?"),
    ("model: {image_encoder: {vision_encoder: {freeze: 'false'}}}", "vision_encoder.freeze: 'false' isn't allowed; choose True, False"),
    ("model: {text_decoder: {recompute_granularity: ful}}", "recompute_granularity: 'ful' isn't allowed; choose full, selective"),
    ("model: {text_decoder: 5}", "model.text_decoder must be a section of key: value lines, not 5"),
    ("model: {text_decoder: {pipeline_num_layers: '1,2'}}", "pipeline_num_layers must be a list of numbers, not '1,2'"),
    ("megatron_training:\n  lr: ${nowhere.lr}", "nowhere"),
    ("megatron_training: {min_lr: 0, min_lr: 1}", "can't be read as YAML"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_mistakes_are_one_sentence(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        load_config(write(tmp_path, text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl_config", "isn't an override: write section.key=value"),
        ("=3", "isn't an override"),
        ("rl_config.n_samples_per_prompt.x=3", "n_samples_per_prompt"),
        # As after a shell's variable that is not set: actor_config.load=$CKPT would be another model's weights.
        ("actor_config.load=", "'actor_config.load=' gives no value; write actor_config.load=null for the default"),
    ],
)
def test_a_bad_override_is_one_sentence(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, "rl_config: {n_samples_per_prompt: 4}"), [override])


def test_defaults_name_files_that_this_one_overrides(tmp_path):
    (tmp_path / "base").mkdir()
    write(tmp_path, "{megatron_training: {seed: 1, lr: 1}, model: {text_decoder: {num_layers: 3}}}", "base/far.yaml")
    near = "defaults: [base/far]\nmegatron_training: {seed: 2}\nrl_config:\n  output: logs/${megatron_training.seed}\n"
    write(tmp_path, near, "near.yaml")
    config = load_config(write(tmp_path, "{defaults: [near, _self_], megatron_training: {seed: 3}}"), ["megatron_training.lr=2"])
    assert (config.actor_config.seed, config.actor_config.lr, config.rl_config.output) == (3, 2.0, "logs/3")
    assert config.model["text_decoder"] == {"num_layers": 3}
    # A later one over an earlier one; the shipped ones are found from anywhere.
    write(tmp_path, "{megatron_training: {seed: 5}}", "later.yaml")
    shipped = load_config(write(tmp_path, "{defaults: [base/text, later, near, later]}")).actor_config
    assert (shipped.seed, shipped.global_batch_size) == (5, 32)
    assert load_config(write(tmp_path, "{defaults: [grpo_trainer_qwen3_8b]}")).model["num_layers"] == 36


def test_defaults_that_lead_nowhere_or_back(tmp_path):
    with pytest.raises(ValueError, match="nowhere.yaml doesn't exist"):
        load_config(write(tmp_path, "{defaults: [nowhere]}"))
    write(tmp_path, "{defaults: [b]}", "a.yaml")
    with pytest.raises(ValueError, match="defaults: b -> a -> b goes in a circle; remove one of them"):
        load_config(write(tmp_path, "{defaults: [a]}", "b.yaml"))
    with pytest.raises(ValueError, match="defaults must be a list, not 'a'"):
        load_config(write(tmp_path, "{defaults: a}"))
    with pytest.raises(ValueError, match="defaults: 5 is neither the name of a file nor a line such as model: qwen25_7b"):
        load_config(write(tmp_path, "{defaults: [5]}"))


def test_a_list_over_a_section_is_one_sentence(tmp_path):
    write(tmp_path, "{rl_config: {actor_resource: {num_npus: 2}}}", "a.yaml")
    with pytest.raises(ValueError, match=r"can't be laid over its defaults \(a\): .*; does a list stand where the other has a section"):
        load_config(write(tmp_path, "{defaults: [a], rl_config: [1]}"))


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match=f"configuration file {tmp_path} is a folder; name a YAML file in it"):
        load_config(tmp_path)


def test_a_missing_file_names_its_neighbour(tmp_path):
    write(tmp_path, "{}", "dapo_tiny.yaml")
    with pytest.raises(ValueError, match="doesn't exist; did you mean .*dapo_tiny.yaml"):
        load_config(tmp_path / "dapo_tny.yaml")


def test_yaml_runs_no_code(tmp_path):
    with pytest.raises(ValueError, match="can't be read as YAML"):
        load_config(write(tmp_path, "rl_config: !!python/object/apply:os.getcwd []"))


def test_no_key_is_of_two_kinds():
    schemas = {"megatron_training": MegatronConfig, "rl_config": RLConfig, "generate_config": GenerateConfig}
    for section, schema in schemas.items():
        kinds = [set(schema.model_fields), set(SPELLINGS.get(section, {}))]
        kinds += [set(known_keys.DERIVED[section]), set(known_keys.NOT_OFFERED[section])]
        kinds += [set(known_keys.ARCHITECTURE)] if section == "megatron_training" else []
        assert sum(map(len, kinds)) == len(set().union(*kinds)), section


def test_every_shipped_yaml_uses_acting_keys_alone():
    for path in sorted(CONFIGS.glob("*.yaml")):
        assert load_config(path).notes == (), path.name
        assert yaml.safe_load(path.read_text())
