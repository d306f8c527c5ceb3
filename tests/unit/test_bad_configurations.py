"""A table of wrong configurations: each ends in one sentence (rule, names, values, what to do) and code 2, and nothing is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mindspeed_mm_rl.cli.main import app
from tests.unit.test_bad_input import CONFIG, row, write_rows

STARTS_SOMETHING = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "socket.bind", "socket.connect")
_watched: list[list[str]] = []
"""The list of the case that is running; an audit hook stays for the life of the interpreter."""


def _hear(event: str, arguments: tuple[object, ...]) -> None:
    if _watched and event in STARTS_SOMETHING:
        _watched[-1].append(f"{event} {arguments}")


sys.addaudithook(_hear)

# Overrides, separated by blanks -> the whole sentence. {folder}: of the YAML, {model}: the Hugging Face folder.
KEYS = {
    # Keys and sections that do not exist, and where they belong.
    "rl_config.mini_batchsize=3": "unknown key rl_config.mini_batchsize; did you mean mini_batch_size?",
    "rl_confg.epochs=2": "unknown section rl_confg; did you mean rl_config?",
    "rl_config.temperature=1": "unknown key rl_config.temperature; did you mean generate_config.sampling_config.temperature?",
    "megatron_training.n_samples_per_prompt=8": (
        "unknown key megatron_training.n_samples_per_prompt; did you mean rl_config.n_samples_per_prompt?"
    ),
    "rl_config.actor_resource.npus=2": "unknown key rl_config.actor_resource.npus; did you mean num_npus?",
    "rl_config.epochs": "'rl_config.epochs' isn't an override: write section.key=value, for example rl_config.mini_batch_size=32",
    "rl_config.epochs.x=3": "rl_config.epochs: {{'x': 3}} isn't allowed; it must be a valid integer",
    "megatron_training.lr=${{nowhere}}": (
        "{folder}/run.yaml: megatron_training.lr: Interpolation key 'nowhere' not found; write the value itself, or a key that exists"
    ),
    # Values of another kind.
    "actor_config.lr=fast": "actor_config.lr: 'fast' isn't allowed; it must be a valid number, unable to parse string as a number",
    "megatron_training.train_iters=2.5": (
        "megatron_training.train_iters: 2.5 isn't allowed; it must be a valid integer, got a number with a fractional part"
    ),
    "megatron_training.bf16=perhaps": (
        "megatron_training.bf16: 'perhaps' isn't allowed; it must be a valid boolean, unable to interpret input"
    ),
    "actor_config.weight_decay=nan": "actor_config.weight_decay: 'nan' isn't allowed; it must be a finite number",
    "rl_config.verifier_function=3": "rl_config.verifier_function.0: 3 isn't allowed; it must be a valid string",
    # Values out of range.
    "megatron_training.global_batch_size=-1": "megatron_training.global_batch_size: -1 isn't allowed; it must be greater than 0",
    "megatron_training.save_interval=0": "megatron_training.save_interval: 0 isn't allowed; it must be greater than 0",
    "megatron_training.seed=4294967296": "megatron_training.seed: 4294967296 isn't allowed; it must be less than 4294967296",
    "actor_config.lr_warmup_fraction=2": "actor_config.lr_warmup_fraction: 2 isn't allowed; it must be less than or equal to 1",
    "actor_config.adam_beta2=1": "actor_config.adam_beta2: 1 isn't allowed; it must be less than 1",
    "rl_config.clip_ratio=1": "rl_config.clip_ratio: 1 isn't allowed; it must be less than 1",
    "rl_config.timeout_seconds=0": "rl_config.timeout_seconds: 0 isn't allowed; it must be greater than 0",
    "rl_config.verifier_timeout=0": "rl_config.verifier_timeout: 0 isn't allowed; it must be greater than 0",
    "rl_config.logprob_gap_bound=-1": "rl_config.logprob_gap_bound: -1 isn't allowed; it must be greater than or equal to 0",
    "generate_config.gpu_memory_utilization=1.5": (
        "generate_config.gpu_memory_utilization: 1.5 isn't allowed; it must be less than or equal to 1"
    ),
    # One of several words.
    "megatron_training.stage=ray_grop": (
        "megatron_training.stage: 'ray_grop' isn't allowed; choose "
        "ray_grpo, ray_dapo, ray_ppo, ray_dr_grpo, ray_rloo, ray_reinforce_plus_plus, "
        "ray_reinforce_plus_plus_baseline, ray_gspo, ray_cispo, dpo (did you mean ray_grpo?)"
    ),
    "actor_config.lr_decay_style=cosin": (
        "actor_config.lr_decay_style: 'cosin' isn't allowed; choose constant, linear, cosine (did you mean cosine?)"
    ),
    "rl_config.kl_penalty=low_var": (
        "rl_config.kl_penalty: 'low_var' isn't allowed; choose kl, abs, mse, low_var_kl (did you mean low_var_kl?)"
    ),
    "generate_config.dtype=float16": "generate_config.dtype: 'float16' isn't allowed; choose bfloat16, float32 (did you mean bfloat16?)",
    # Missing.
    "megatron_training.stage=null": "megatron_training.stage is missing and has no default; add it to the YAML",
    "megatron_training.data_path=null": "megatron_training.data_path is missing and has no default; add it to the YAML",
}

RULES = {
    "rl_config.n_samples_per_prompt=1": (
        "rl_config.n_samples_per_prompt (1) must be >= 2: ray_dapo compares samples of a prompt; raise it"
    ),
    "rl_config.mini_batch_size=5": (
        "rl_config.mini_batch_size (5 prompts) must be <= megatron_training.global_batch_size (4 prompts); lower it"
    ),
    "rl_config.filter_groups_enable=true rl_config.filter_groups_train_batch_size=8": (
        "rl_config.filter_groups_max_batches (1) x megatron_training.global_batch_size (4) = 4 prompts must be >= "
        "rl_config.filter_groups_train_batch_size (8); raise the limit (-1 = none)"
    ),
    "generate_config.max_model_len=71": (
        "generate_config.max_model_len (71) must be >= rl_config.max_prompt_length (64) + generate_config.sampling_config.max_tokens (8) = "
        "72; raise it or remove it"
    ),
    "generate_config.max_num_seqs=4096": (
        "generate_config.max_num_seqs (4096) must be <= generate_config.max_num_batched_tokens (2048), as every sequence takes a token of "
        "each step; lower the first or raise the second"
    ),
    "generate_config.sampling_config.temperature=0.001": (
        "generate_config.sampling_config.temperature (0.001) must be >= 0.01, the lowest that the rollout engine samples with; raise it"
    ),
    "generate_config.dtype=bfloat16": (
        "generate_config.dtype (bfloat16) must be float32, as bf16 is false: trainer and rollout engine run the same policy; change one of "
        "the two"
    ),
    "actor_config.min_lr=1": "actor_config.min_lr (1.0) must be <= actor_config.lr (1e-06); lower it",
    "megatron_training.min_pixels=60000": (
        "megatron_training.min_pixels (60000) must be <= megatron_training.max_pixels (50176); lower it"
    ),
    "rl_config.verifier_weight=[1,2]": (
        "rl_config.verifier_weight has 2 value(s) [1.0, 2.0] for 1 verifier(s) ['the default one']; give one weight each"
    ),
    "rl_config.verifier_weight=[0]": "rl_config.verifier_weight is [0.0]: every reward would be 0; give a weight other than 0",
    "rl_config.verifier_by_source.gsm8k.acc=0": (
        "rl_config.verifier_by_source: gsm8k has {{'acc': 0.0}}, so every reward would be 0; give a verifier a weight other than 0"
    ),
    "rl_config.verifier_by_source.gsm8k=[]": (
        "rl_config.verifier_by_source: gsm8k has no verifiers, so every reward would be 0; give a verifier a weight other than 0"
    ),
    "rl_config.verifier_function=reward_model": (
        "rl_config.verifier_function names reward_model, but rl_config.reward_model is not given; give a sequence classifier's folder"
    ),
    "rl_config.reward_model=rm": "rl_config.reward_model (rm) would never be asked; name reward_model in rl_config.verifier_function",
    "rl_config.verifier_function=[acc,acc]": (
        "rl_config.verifier_function names acc twice (['acc', 'acc']); name it once and raise its weight"
    ),
    "rl_config.clip_higher_enable=true rl_config.clip_ratio_low=0.3 rl_config.clip_ratio_high=0.2": (
        "rl_config.clip_ratio_low (0.3) must be <= rl_config.clip_ratio_high (0.2); change one"
    ),
    "rl_config.overlong_buffer_enable=true": (
        "rl_config.rollout_max_tokens (2048) must equal generate_config.sampling_config.max_tokens (8) when overlong_buffer_enable is true"
        "; set one to the other"
    ),
    "rl_config.overlong_buffer_enable=true rl_config.rollout_max_tokens=8 rl_config.overlong_buffer=8": (
        "rl_config.overlong_buffer (8) must be > 0 and < generate_config.sampling_config.max_tokens (8) when overlong_buffer_enable is "
        "true; change it or set overlong_buffer_enable to false"
    ),
    "rl_config.adv_estimator=gae": (
        "rl_config.adv_estimator (gae) must be group_norm for megatron_training.stage ray_dapo; set it or remove it"
    ),
    "actor_config.tensor_model_parallel_size=2": (
        "rl_config.actor_resource.num_npus (1) must be a multiple of actor_config's tensor x pipeline x context parallel sizes "
        "(2 x 1 x 1 = 2); num_npus 2 would do, or sizes whose product is 1"
    ),
    "generate_config.infer_expert_parallel_size=2": (
        "generate_config.infer_expert_parallel_size (2) needs generate_config.enable_expert_parallel (true), which is false; set it to "
        "true, or infer_expert_parallel_size to 1"
    ),
    "generate_config.enable_expert_parallel=true generate_config.infer_expert_parallel_size=3": (
        "rl_config.actor_resource.num_npus (1) must be a multiple of generate_config.infer_tensor_parallel_size (1) x "
        "generate_config.infer_expert_parallel_size (3) = 3; change one of them"
    ),
    "generate_config.infer_tensor_parallel_size=2": (
        "rl_config.actor_resource.num_npus (1) must be a multiple of generate_config.infer_tensor_parallel_size (2); change one of them"
    ),
    "actor_config.sequence_parallel=true": (
        "actor_config.sequence_parallel (true) needs actor_config.tensor_model_parallel_size > 1, which is 1; set sequence_parallel to "
        "false"
    ),
    "eval.interval=1": "eval.data_path is missing and has no default; name a file, or remove the section eval",
    "eval.data_path=[a.parquet,a.parquet]": "eval.data_path names a.parquet twice; name it once",
    "eval.data_path=a.parquet eval.temperature=0.001": (
        "eval.temperature (0.001) must be 0 (greedy) or >= 0.01, the lowest that the rollout engine samples with; change it"
    ),
    "eval.data_path=a.parquet eval.temperature=0 eval.n_samples_per_prompt=4": (
        "eval.n_samples_per_prompt (4) must be 1 when eval.temperature is 0: greedy responses to a prompt are all the same; lower the "
        "first or raise the second"
    ),
    "eval.data_path=a.parquet eval.verifier_function=reward_model": (
        "eval.verifier_function (['reward_model']) names reward_model, whose score doesn't say what is right; name rules, for example acc"
    ),
}

NOT_OFFERED = {
    "generate_config.sampling_config.top_k=50": (
        "generate_config.sampling_config.top_k: 50 isn't offered in this version; set it to -1: the loss needs the distribution that was "
        "sampled from, whole"
    ),
    "megatron_training.hidden_dropout=0.1": (
        "megatron_training.hidden_dropout: 0.1 isn't offered in this version; remove it: policies are trained without dropout, as they "
        "sample without"
    ),
    "rl_config.multi_turn_enable=true": (
        "rl_config.multi_turn_enable: True isn't offered in this version; set it to false: one response per prompt"
    ),
    "actor_rollout_ref.rollout.n=5": (
        "section actor_rollout_ref isn't offered: it is verl's; write actor_config.lr and its parallel sizes, "
        "rl_config.n_samples_per_prompt and mini_batch_size, and generate_config"
    ),
    "reward_config.load=x": (
        "section reward_config isn't offered: give a sequence classifier's folder in rl_config.reward_model and name reward_model in "
        "rl_config.verifier_function"
    ),
}

AGAINST_FILES = {
    "rl_config.verifier_function=[geo4k]": (
        "rl_config.verifier_function names 'geo4k', which does not exist; did you mean 'geo3k'? Verifiers: {verifiers}, "
        "reward_model, or path/to/file.py:name"
    ),
    "rl_config.verifier_function=none.py:f": "rl_config.verifier_function: none.py doesn't exist (looked in {folder}, {repository})",
    "rl_config.verifier_function=reward_model rl_config.reward_model={folder}": (
        "rl_config.reward_model: {folder} holds no config.json; give the folder of a Hugging Face sequence classifier"
    ),
    "rl_config.verifier_by_source.gsm8k=step rl_config.filter_groups_enable=true rl_config.filter_groups_metric=geo3k": (
        "rl_config.verifier_by_source: gsm8k: rl_config.filter_groups_metric is 'geo3k', but the scores of this run are step, accuracy, "
        "acc, acc_for_dapo, score; did you mean 'step'?"
    ),
    "rl_config.filter_groups_enable=true rl_config.filter_groups_metric=geo": (
        "rl_config.filter_groups_metric is 'geo', but the scores of this run are geo3k, geo3k_acc, geo3k_format, accuracy, acc, "
        "acc_for_dapo, score; did you mean 'geo3k'?"
    ),
    "megatron_training.num_layers=99": (
        "megatron_training.num_layers is 99, but num_hidden_layers in {model}/config.json is 2; config.json decides: write its number, or "
        "remove num_layers"
    ),
    "rl_config.actor_resource.num_npus=2 actor_config.expert_model_parallel_size=2": (
        "actor_config.expert_model_parallel_size (2) needs a mixture of experts, which {model}/config.json isn't; set it to 1 (and "
        "moe_tp_extend_ep to false)"
    ),
    "rl_config.actor_resource.num_npus=2 actor_config.pipeline_model_parallel_size=2 actor_config.num_layer_list=2,1": (
        "actor_config.num_layer_list [2, 1] sums to 3, but the model has 2 layers; '1,1' would do"
    ),
    "rl_config.actor_resource.num_npus=2 actor_config.virtual_pipeline_model_parallel_size=2": (
        "actor_config.virtual_pipeline_model_parallel_size (2) needs actor_config.pipeline_model_parallel_size > 1, which is 1: virtual "
        "stages alternate over pipeline ranks; remove it, or set pipeline_model_parallel_size to 2 or more"
    ),
    "rl_config.actor_resource.num_npus=3 actor_config.context_parallel_size=3": (
        "actor_config.context_parallel_size (3) must divide num_attention_heads / tensor_model_parallel_size (4 / 1 = 4), and divide or be "
        "a multiple of the key/value heads left (2), with ulysses_cp_algo; 1, 2 or 4 would do, or any size with "
        "actor_config.context_parallel_algo megatron_cp_algo"
    ),
    "rl_config.max_prompt_length=100000": (
        "generate_config.max_model_len (100008; unless given, rl_config.max_prompt_length + max_tokens) must be <= max_position_embeddings "
        "(4096) of {model}/config.json; lower it"
    ),
    "generate_config.kv_cache_bytes=1000": (
        "generate_config.kv_cache_bytes (1000) must be >= 262144, the keys and values of one sequence of 72 tokens (max_model_len); raise "
        "it"
    ),
    "megatron_training.min_pixels=1 megatron_training.max_pixels=783": (
        "megatron_training.max_pixels (783) must be >= megatron_training.min_pixels (1) and >= 784, one merged patch of 14 x 2 pixels a "
        "side; raise it"
    ),
    "generate_config.limit_mm_image_per_prompt=0": (
        "{folder}/data/train.parquet, row 0: 1 images, but generate_config.limit_mm_image_per_prompt is 0; raise it "
        "(megatron_training.skip_bad_rows: true leaves such rows out)"
    ),
    "eval.data_path={folder}/data": "eval.data_path: {folder}/data is a folder; name a file in it, for example {folder}/data/test.parquet",
    "eval.data_path=/nowhere/test.parquet": (
        "eval.data_path: data file /nowhere/test.parquet does not exist, and no test.parquet_packed_*_document.idx beside it: make it with "
        "examples/rl/data_preprocess, or correct the path in megatron_training.data_path or eval.data_path"
    ),
    "megatron_training.tokenizer_name_or_path=/nowhere/model": (
        "megatron_training.tokenizer_name_or_path: /nowhere/model is not a folder; give a Hugging Face folder"
    ),
    "model=none.json": "model: none.json doesn't exist (looked in {folder}, {repository})",
    "rl_config.runtime_env_path=none.yaml": "rl_config.runtime_env_path: none.yaml doesn't exist (looked in {folder}, {repository})",
    "actor_config.save={folder}/run.yaml/saves": (
        "actor_config.save: {folder}/run.yaml/saves can't be written to ({folder}/run.yaml is a file)"
    ),
    "rl_config.resume=/nowhere/save": ("rl_config.resume: /nowhere/save is not a folder; give auto, off, or the folder of a training save"),
    "actor_config.load=/nowhere/weights": (
        "actor_config.load: /nowhere/weights is not a folder; weights are a Hugging Face folder (config.json and *.safetensors), the "
        "output of mm-convert (latest_checkpointed_iteration.txt saying release), or a training save (latest_checkpointed_iteration.txt "
        "saying an iteration)"
    ),
}
TABLE = [*KEYS.items(), *RULES.items(), *NOT_OFFERED.items(), *AGAINST_FILES.items()]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, tiny_vl: Path) -> dict[str, str]:
    """A sound configuration in {folder}/run.yaml, and what the sentences say of this machine."""
    folder = tmp_path_factory.mktemp("run")
    data = write_rows(folder / "data", [row(index) for index in range(4)])
    (folder / "run.yaml").write_text(CONFIG.format(model=tiny_vl, data=data, folder=folder))
    from mindspeed_mm_rl.rewards.registry import VERIFIERS

    return {
        "folder": str(folder),
        "model": str(tiny_vl),
        "repository": str(Path(__file__).parents[2]),
        "verifiers": ", ".join(VERIFIERS),
    }


def train(words: dict[str, str], overrides: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, list[str]]:
    """Exit code, stderr, and what was started. Not a dry run: what builds a run cannot be imported, so good input would fail here."""
    monkeypatch.setitem(sys.modules, "mindspeed_mm_rl.trainer.build", None)
    monkeypatch.chdir(words["repository"])
    _watched.append([])
    try:
        result = CliRunner().invoke(app, ["train", "--config", f"{words['folder']}/run.yaml", *overrides.split()])
    finally:
        started = _watched.pop()
    return result.exit_code, result.stderr, started


def test_the_tripwires_work(words, monkeypatch):
    """With nothing wrong, the command gets as far as building the run; and a process that is started is noticed."""
    code, error, _ = train(words, "", monkeypatch)
    assert code == 2 and error.startswith("error: import of mindspeed_mm_rl.trainer.build halted")
    _watched.append([])
    subprocess.run(["true"], check=True)
    assert _watched.pop()


@pytest.mark.parametrize(("overrides", "sentence"), TABLE, ids=[overrides for overrides, _ in TABLE])
def test_one_sentence_and_nothing_started(words, monkeypatch, overrides, sentence):
    code, error, started = train(words, overrides.format(**words), monkeypatch)
    assert error.splitlines()[-1] == f"error: {sentence.format(**words)}"
    assert "Traceback" not in error
    assert code == 2
    assert not started
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


def test_there_are_enough():
    assert len({overrides for overrides, _ in TABLE}) == len(TABLE) >= 40
