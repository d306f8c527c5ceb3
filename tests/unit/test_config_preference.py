"""The keys of DPO: what users' files say arrives, wrong combinations end in one sentence, keys without a say are named."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from mindspeed_mm_rl.cli.plan_view import render_plan
from mindspeed_mm_rl.config.derive import make_plan
from mindspeed_mm_rl.config.load import load_config
from mindspeed_mm_rl.config.plan import Plan, PreferencePlan

CONFIGS = Path(__file__).parents[2] / "examples/rl/configs"
# Their file for Qwen3-30B-A3B, kernel switches and architecture left out.
USERS = """
megatron_training:
  finetune: true
  stage: dpo
  is_pairwise_dataset: true
  variable_seq_lengths: true
  tokenizer_not_use_fast: true
  dpo_loss_type: sigmoid
  micro_batch_size: 1
  global_batch_size: 64
  tokenizer_type: PretrainedFromHF
  tokenizer_name_or_path: ./model
  train_iters: 1000
  lr: 5e-8
  min-lr: 0
  lr_decay_style: constant
  initial_loss_scale: 4096
  init_method_std: 0.02
  attention_dropout: 0.0
  bf16: true
  seq_length: 4096
  no_shuffle: true
  data_path: ./dataset/dpo
  split: 100,0,0
  no_load_optim: true
  no_load_rng: true
  no_save_optim: true
  no_save_rng: true
  load: ./weights/
  save: ./ckpt
  ref_model: ./weights/
  refer_model_iter: 1
  log_interval: 1
  eval_interval: 5000
  eval_iters: 0
"""
# Theirs to go on with a save.
RESUMED = "megatron_training: {finetune: false, load: ./ckpt-30b, save: ./ckpt, no_load_optim: false, no_load_rng: false}"


def plan_of(folder: Path, *overrides: str, text: str = USERS) -> Plan:
    (folder / "run.yaml").write_text(textwrap.dedent(text))
    return make_plan(load_config(folder / "run.yaml", overrides))


def test_users_file_makes_a_plan_unchanged(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert plan.preference == PreferencePlan("sigmoid", 0.1, 0.0, 0.5, 0.0, cache_reference=True)
    assert (plan.run.prompts_per_generation, plan.run.mini_batch_prompts, plan.run.train_iters) == (64, 64, 1000)
    assert (plan.data.max_pair_length, plan.data.max_prompt_length, plan.data.shuffle) == (4096, 4096, False)
    # micro_batch_size counts pairs; nothing is sampled, so nothing is divided by a temperature or banned.
    train = plan.train
    assert (train.max_samples_per_micro_batch, train.rows_together, train.temperature, train.bans_markers) == (2, 2, 1.0, False)
    assert plan.needs_reference and train.reference_load == train.load == str(Path("weights").absolute())


def test_users_keys_to_go_on_with_a_save_stand_in_megatron_training(tmp_path: Path) -> None:
    (tmp_path / "resumed.yaml").write_text(RESUMED)
    resumed = f"defaults:\n  - run\n{RESUMED}"
    (tmp_path / "run.yaml").write_text(USERS)
    (tmp_path / "more.yaml").write_text(resumed)
    plan = make_plan(load_config(tmp_path / "more.yaml"))
    assert (plan.train.finetune, plan.train.load, plan.run.save) == (False, str(Path("ckpt-30b").absolute()), str(Path("ckpt").absolute()))


def test_every_loss_key_is_reachable(tmp_path: Path) -> None:
    keys = {"dpo_loss_type": "robust", "dpo_beta": 0.3, "dpo_label_smoothing": 0.2, "pref_ftx": 0.5, "cache_ref_logprobs": "false"}
    plan = plan_of(tmp_path, *(f"megatron_training.{key}={value}" for key, value in keys.items()), "megatron_training.ref_model=other")
    assert plan.preference == PreferencePlan("robust", 0.3, 0.2, 0.5, 0.5, cache_reference=False)
    assert (plan.train.reference_load, plan.reference_key) == (str(Path("other").absolute()), "megatron_training.ref_model")
    of_rl_config = "rl_config.integrated_mode_config.ref_model_load_path"
    in_rl_config = plan_of(tmp_path, f"{of_rl_config}=other", "megatron_training.ref_model=null")
    assert in_rl_config.reference_key == of_rl_config
    simpo = plan_of(tmp_path, "megatron_training.dpo_loss_type=simpo", "megatron_training.simpo_gamma=1.5")
    assert simpo.preference.simpo_gamma == 1.5 and not simpo.needs_reference
    assert any("ref_model: simpo has no reference" in note for note in simpo.notes)


def test_held_out_rows_are_evaluated_and_not_trained_on(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "eval.held_out_rows=50", "eval.interval=10")
    assert plan.data.row_slice == (None, -50)
    assert (plan.eval.data, plan.eval.held_out_rows, plan.eval.interval) == ((plan.data.train_path,), 50, 10)


def test_the_printed_plan_is_silent_about_sampling(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "rl_config.init_kl_coef=0.1", "generate_config.sampling_config.temperature=0.5", "rl_config.epochs=2")
    shown = render_plan(plan)
    assert "preference" in shown and "rollout" not in shown and "clip_ratio" not in shown
    assert "rl_config: init_kl_coef: dpo neither samples nor grades" in plan.notes
    assert "generate_config: sampling_config: dpo neither samples nor grades" in plan.notes


def test_in_other_stages_the_keys_are_named(tmp_path: Path) -> None:
    rl = ["megatron_training.stage=ray_dapo", "rl_config.n_samples_per_prompt=8", "megatron_training.is_pairwise_dataset=false"]
    plan = plan_of(tmp_path, *rl, text=USERS.replace("  ref_model: ./weights/\n", ""))
    assert "megatron_training: dpo_loss_type, seq_length: ray_dapo trains on prompts, not on pairs" in plan.notes
    assert plan.preference is None and plan.train.rows_together == 1 and plan.train.bans_markers


BROKEN = {
    "megatron_training.is_pairwise_dataset=false": (
        "megatron_training.is_pairwise_dataset (false) must be true for megatron_training.stage dpo, which trains on pairs; set it or "
        "remove it"
    ),
    "megatron_training.stage=ray_dapo rl_config.n_samples_per_prompt=8": (
        "megatron_training.is_pairwise_dataset (true) must be false for megatron_training.stage ray_dapo, which trains on prompts; set it "
        "or remove it"
    ),
    "megatron_training.dpo_label_smoothing=0.1 megatron_training.dpo_loss_type=ipo": (
        "megatron_training.dpo_label_smoothing (0.1) must be 0 for dpo_loss_type ipo: sigmoid and robust alone know wrong labels; set it "
        "to 0 or take one of these"
    ),
    "megatron_training.dpo_loss_type=robust": (
        "megatron_training.dpo_label_smoothing (0) must be > 0 for dpo_loss_type robust, which corrects that share of wrong labels: set "
        "it, for example to 0.1, or take sigmoid"
    ),
    "rl_config.integrated_mode_config.ref_model_load_path=other": (
        "megatron_training.ref_model (./weights/) and rl_config.integrated_mode_config.ref_model_load_path (other) name two references; "
        "remove one of them"
    ),
    "eval.held_out_rows=5 eval.data_path=test.jsonl": (
        "eval.held_out_rows (5) and eval.data_path (test.jsonl) are two answers; remove one of them"
    ),
    "megatron_training.stage=ray_dapo rl_config.n_samples_per_prompt=8 megatron_training.is_pairwise_dataset=null eval.held_out_rows=5": (
        "eval.held_out_rows (5) is for megatron_training.stage dpo; name a file in eval.data_path instead"
    ),
    "eval.interval=5": "eval.data_path is missing and has no default; name a file, or remove the section eval",
    "megatron_training.dpo_beta=0": "megatron_training.dpo_beta: 0 isn't allowed; it must be greater than 0",
    "megatron_training.dpo_label_smoothing=0.5": "megatron_training.dpo_label_smoothing: 0.5 isn't allowed; it must be less than 0.5",
    "megatron_training.dpo_loss_type=sigmoids": (
        "megatron_training.dpo_loss_type: 'sigmoids' isn't allowed; choose sigmoid, robust, hinge, ipo, simpo, orpo (did you mean sigmoid?)"
    ),
}


@pytest.mark.parametrize("overrides", BROKEN)
def test_a_broken_rule_is_one_sentence(tmp_path: Path, overrides: str) -> None:
    with pytest.raises(ValueError) as error:
        plan_of(tmp_path, *overrides.split())
    assert str(error.value) == BROKEN[overrides]


def test_pairs_must_fit_into_the_models_positions(tmp_path: Path, tiny_text: Path) -> None:
    with pytest.raises(ValueError, match=r"seq_length \(5000\) must be <= max_position_embeddings \(4096\)"):
        plan_of(tmp_path, f"megatron_training.tokenizer_name_or_path={tiny_text}", "megatron_training.seq_length=5000")


def test_the_shipped_file_has_the_settings_that_users_know() -> None:
    plan = make_plan(load_config(CONFIGS / "dpo_trainer_qwen3_30b_a3b.yaml"))
    run, train, optimizer = plan.run, plan.train, plan.train.optimizer
    assert (run.prompts_per_generation, run.num_devices, run.seed) == (64, 32, 42)
    assert (train.tensor_parallel_size, train.pipeline_parallel_size, train.sequence_parallel) == (2, 8, True)
    assert (plan.data.max_pair_length, optimizer.lr, optimizer.lr_decay_style, optimizer.weight_decay) == (4096, 5e-8, "constant", 0.0)
    assert (plan.preference.loss_type, plan.preference.beta, train.max_samples_per_micro_batch) == ("sigmoid", 0.1, 2)
