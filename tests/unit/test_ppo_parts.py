"""What PPO adds around the engines: the critic's section, where its weights come from when a run goes on, and its numbers."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mindspeed_mm_rl.algorithms.advantages import explained_variance
from mindspeed_mm_rl.algorithms.kl import KLController, mean_token_kl
from mindspeed_mm_rl.cli.preflight import preflight
from mindspeed_mm_rl.config.derive import make_plan
from mindspeed_mm_rl.config.load import load_config
from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.trainer.resume import start_of
from mindspeed_mm_rl.trainer.state import save_bytes
from mindspeed_mm_rl.types import Batch, Ragged
from tests.data_files import row, write_rows
from tests.plans import optimizer_plan, whole_plan
from tests.saves import make_saves
from tests.tiny import make_tiny_vl
from tests.unit.test_config_load import write

PPO = """
megatron_training:
  stage: ray_ppo
  tokenizer_name_or_path: model
  data_path: data
  global_batch_size: 64
  train_iters: 80
  lr: 1.0e-6
  lr_warmup_fraction: 0.1
rl_config:
  mini_batch_size: 16
  critic_warmup: 5
actor_config:
  load: weights
  save: saves
critic_config:
  lr: 5.0e-6
  min_lr: 1.0e-7
  lr_decay_style: constant
  clip_grad: 0.5
"""
USERS_RESUME_PPO = """
actor_config:
  finetune: false
  load: ./ckpt
  save: ./ckpt
  no_load_optim: false
  no_load_rng: false
critic_config:
  finetune: false
  load: ./ckpt
  save: ./ckpt
  no_load_optim: false
  no_load_rng: false
rl_config:
  integrated_mode_config:
    ref_model_load_path: ./Qwen2.5-32B-tp8
"""


def plan_of(folder: Path, *overrides: str) -> Plan:
    return make_plan(load_config(write(folder, PPO), overrides))


def test_a_critic_is_an_actor_with_a_section_of_its_own(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "critic_config.train_iters=3", "critic_config.micro_batch_size=2", "critic_config.no_load_optim=true")
    critic, actor = plan.critic, plan.train
    assert (critic.optimizer.lr, critic.optimizer.min_lr, critic.optimizer.lr_decay_style) == (5e-6, 1e-7, "constant")
    assert (critic.optimizer.clip_grad, actor.optimizer.clip_grad, actor.optimizer.lr) == (0.5, 1.0, 1e-6)
    # 80 iterations of 64 / 16 mini-batches; the actor rests in the first 5.
    assert (critic.optimizer.decay_updates, actor.optimizer.decay_updates) == (320, 300)
    assert (critic.optimizer.warmup_updates, actor.optimizer.warmup_updates) == (32, 30)
    assert critic.load == actor.load == str(Path("weights").absolute())
    assert (critic.max_samples_per_micro_batch, actor.max_samples_per_micro_batch) == (2, 0)
    assert (critic.no_load_optim, actor.no_load_optim, plan.run.critic_warmup) == (True, False, 5)
    assert plan_of(tmp_path, "critic_config.load=judge").critic.load == str(Path("judge").absolute())
    told = [note for note in plan.notes if note.startswith("critic_config")]
    assert len(told) == 1 and "train_iters (3)" in told[0] and "micro_batch_size" not in told[0]
    assert not [note for note in plan_of(tmp_path, "actor_config.finetune=true").notes if note.startswith("critic_config")]


def test_users_fragment_of_a_resumed_run_loads(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    merged = OmegaConf.merge(OmegaConf.create(PPO), OmegaConf.create(USERS_RESUME_PPO))
    OmegaConf.save(merged, tmp_path / "merged.yaml")
    plan = make_plan(load_config(tmp_path / "merged.yaml"))
    assert plan.critic.load == plan.train.load == plan.run.save == str(Path("ckpt").absolute())
    assert plan.train.reference_load == str(Path("Qwen2.5-32B-tp8").absolute())


def test_other_stages_have_no_critic_and_say_so(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "megatron_training.stage=ray_grpo", "rl_config.n_samples_per_prompt=4", "rl_config.critic_warmup=0")
    assert plan.critic is None
    assert any(note.startswith("critic_config: lr") and "ray_grpo has no critic" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["rl_config.critic_warmup=80"], r"critic_warmup \(80\) must be < megatron_training.train_iters \(80\)"),
        (["megatron_training.stage=ray_grpo"], r"critic_warmup \(5\) must be 0: .*ray_grpo has no critic"),
        (["critic_config.save=elsewhere"], r"critic_config.save \(elsewhere\) must be actor_config.save \(saves\)"),
        (["critic_config.min_lr=1"], r"critic_config.min_lr \(1.0\) must be <= critic_config.lr \(5e-06\)"),
        (["critic_config.learning_rate=1"], r"unknown key critic_config.learning_rate"),
    ],
)
def test_one_sentence_for_what_cannot_be(tmp_path: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        plan_of(tmp_path, "rl_config.n_samples_per_prompt=4", *overrides)


@pytest.fixture
def plan(tiny_text: Path, tmp_path: Path) -> Plan:
    data = write_rows(tmp_path / "train.parquet", [row(text=f"Is it {number}?", images=[]) for number in range(6)])
    whole = whole_plan(tiny_text, data, tmp_path)
    whole = replace(whole, run=replace(whole.run, train_iters=6), recipe=replace(whole.recipe, algorithm="ppo"))
    return replace(whole, critic=replace(whole.train, optimizer=optimizer_plan(lr=5e-3)))


def test_actor_and_critic_go_on_from_one_save(plan: Plan) -> None:
    saves = make_saves(plan, 2, 4)
    start = start_of(plan)
    assert start.plan.train.load == str(saves.path_of(4) / "actor") and start.plan.critic.load == str(saves.path_of(4) / "critic")
    assert start.plan.critic.optimizer.lr == 5e-3
    assert all(preflight(start))
    next((saves.path_of(4) / "critic").glob("*.distcp")).unlink()
    assert start_of(plan).iteration == 2, "a save without its critic is not whole"


def test_a_run_without_a_critic_cannot_go_on_as_ppo(plan: Plan) -> None:
    saves = make_saves(replace(plan, critic=None), 2)
    with pytest.raises(ValueError, match=rf"{saves.path_of(2)} has no critic: .*actor_config.finetune=true"):
        start_of(plan)
    make_saves(plan, 4)
    without = start_of(replace(plan, critic=None))
    assert without.iteration == 4 and without.plan.critic is None


def test_a_critic_with_another_frozen_vision_encoder_is_refused_before_any_worker(plan: Plan, tiny_vl: Path, tmp_path: Path) -> None:
    other = make_tiny_vl(tmp_path / "other", seed=1)
    train = replace(plan.train, hf_path=str(tiny_vl), load=str(tiny_vl))
    with pytest.raises(ValueError, match=r"critic_config.load: the vision encoder is frozen, but image_encoder"):
        start_of(replace(plan, train=train, critic=replace(train, load=str(other))))
    assert start_of(replace(plan, train=train, critic=replace(train, load=str(other), freeze_projector=False))).save is None


def test_encoders_that_were_trained_apart_cannot_be_frozen_as_one(plan: Plan, tiny_vl: Path, tmp_path: Path) -> None:
    """A save holds both: whether it is continued, or its weights are the start of another run."""
    train = replace(plan.train, hf_path=str(tiny_vl), load=str(tiny_vl), freeze_vision=False)
    trained = replace(plan, train=train, critic=replace(train, load=str(make_tiny_vl(tmp_path / "other", seed=1))))
    saves = make_saves(trained, 2)
    assert start_of(trained).iteration == 2

    def frozen(plan: Plan, **changes: object) -> Plan:
        train, critic = (replace(part, freeze_vision=True, **changes) for part in (plan.train, plan.critic))
        return replace(plan, train=train, critic=critic)

    with pytest.raises(ValueError, match="the vision encoder is frozen, but image_encoder"):
        start_of(frozen(trained))
    elsewhere = replace(trained, run=replace(trained.run, save=str(tmp_path / "elsewhere")))
    with pytest.raises(ValueError, match="the vision encoder is frozen, but image_encoder"):
        start_of(frozen(elsewhere, load=str(saves.root), finetune=True))
    assert start_of(frozen(elsewhere, load=str(tiny_vl))).save is None


def test_a_save_with_a_critic_takes_twice_the_space(plan: Plan) -> None:
    """But for the head: a tied model has none, the critic's is one row of 128 float32 with two moments."""
    alone = save_bytes(replace(plan, critic=None))
    assert save_bytes(plan) == 2 * alone + 128 * 12


def test_explained_variance_by_hand() -> None:
    mask = Ragged(torch.tensor([1.0, 1.0, 0.0, 1.0]), (3, 1))

    def explained(values: list[float], returns: list[float]) -> float:
        return explained_variance(Ragged(torch.tensor(values), (3, 1)), Ragged(torch.tensor(returns), (3, 1)), mask)

    assert explained([1.0, 2.0, 99.0, 3.0], [1.0, 2.0, 0.0, 3.0]) == 1.0
    assert explained([5.0, 5.0, 99.0, 5.0], [1.0, 2.0, 0.0, 3.0]) == 0.0
    # Returns 1, 2, 3 have variance 2/3; what is left of them, 1, 0, 1, has 2/9.
    assert explained([0.0, 2.0, 99.0, 2.0], [1.0, 2.0, 0.0, 3.0]) == pytest.approx(1 - (2 / 9) / (2 / 3))
    assert explained([1.0, 2.0, 99.0, 3.0], [4.0, 4.0, 0.0, 4.0]) == 0.0


def test_the_coefficient_follows_what_was_taken_off_the_reward() -> None:
    lengths = (2, 1)
    batch = Batch(
        sample_ids=(0, 1),
        prompts=Ragged(torch.tensor([5, 5]), (1, 1)),
        responses=Ragged(torch.tensor([6, 7, 8]), lengths),
        loss_mask=Ragged(torch.tensor([1.0, 1.0, 0.0]), lengths),
        rollout_logprobs=Ragged(torch.zeros(3), lengths),
        image_keys=((), ()),
        rewards=(1.0, 0.0),
        samples_per_prompt=1,
        old_logprobs=Ragged(torch.tensor([-1.0, -1.0, -1.0]), lengths),
        ref_logprobs=Ragged(torch.tensor([-1.3, -1.1, -9.0]), lengths),
    )
    assert mean_token_kl(batch, "kl") == pytest.approx((0.3 + 0.1) / 2)
    controller = KLController(0.1, adaptive=True, target=0.25, horizon=10.0)
    controller.update(mean_token_kl(batch, "kl"), num_samples=2)
    # 0.2 is 20 % below the target, at the bound of 20 %; 2 of 10 samples of the horizon.
    assert controller.coef == pytest.approx(0.1 * (1 - 0.2 * 2 / 10))
    before = controller.coef
    controller.update(math.inf, num_samples=0)
    assert controller.coef == before, "without a trained sample there is nothing to follow"
    continued = KLController(0.1, adaptive=True, target=0.25, horizon=10.0)
    continued.load_state(controller.state())
    assert continued.coef == before


def test_a_term_that_was_switched_on_or_off_by_the_user_stays_so() -> None:
    """A coefficient of 0 never leaves 0, and with one above 0 the loss asks for a reference that isn't there."""
    on, off = (KLController(coef, adaptive=True, target=0.1, horizon=10.0) for coef in (0.1, 0.0))
    state_on, state_off = on.state(), off.state()
    on.load_state(state_off)
    off.load_state(state_on)
    assert (on.coef, off.coef) == (0.1, 0.0)
