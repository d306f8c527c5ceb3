"""Where a run begins: every value of rl_config.resume, what is refused, and which reference a resumed KL term has."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mindspeed_mm_rl.cli.main import app
from mindspeed_mm_rl.cli.preflight import preflight
from mindspeed_mm_rl.config.plan import Plan, PreferencePlan
from mindspeed_mm_rl.models.weight_digest import weight_digest
from mindspeed_mm_rl.trainer.resume import Start, start_of
from mindspeed_mm_rl.trainer.save_folder import STATE_FILE, TRACKER
from tests.data_files import row, write_rows
from tests.plans import whole_plan
from tests.saves import make_saves


@pytest.fixture
def plan(tiny_text: Path, tmp_path: Path) -> Plan:
    """6 iterations of a text model; no KL term."""
    data = write_rows(tmp_path / "train.parquet", [row(text=f"Is it {number}?", images=[]) for number in range(6)])
    plan = whole_plan(tiny_text, data, tmp_path)
    return changed(plan, train_iters=6, freeze_vision=False, freeze_projector=False)


def changed(plan: Plan, **values: object) -> Plan:
    """The plan with other values in whichever part has them."""
    for part in ("run", "train", "data", "recipe"):
        fields = getattr(plan, part).__dataclass_fields__
        plan = replace(plan, **{part: replace(getattr(plan, part), **{key: value for key, value in values.items() if key in fields})})
    return plan


def refused(plan: Plan) -> str:
    with pytest.raises(ValueError) as error:
        start_of(plan)
    return str(error.value)


def on_pairs(plan: Plan, loss_type: str = "sigmoid") -> Plan:
    return replace(plan, preference=PreferencePlan(loss_type, 0.1, 0.0, 0.5, 0.0, cache_reference=True))


def test_a_save_of_prompts_is_not_continued_with_pairs(plan: Plan) -> None:
    saves = make_saves(plan, 2)
    assert f"{saves.path_of(2)} was trained on prompts, but this run trains on pairs" in refused(on_pairs(plan))
    assert start_of(changed(on_pairs(plan), resume="off")).save is None


def test_pairs_are_compared_with_what_training_begins_with_where_the_loss_compares(plan: Plan) -> None:
    assert start_of(on_pairs(plan)).reference.path == plan.train.load
    assert start_of(on_pairs(plan, "orpo")).reference is None


def test_without_a_save_a_run_is_new(plan: Plan) -> None:
    for resume in ("auto", "off"):
        start = start_of(changed(plan, resume=resume))
        assert (start.save, start.iteration, start.notes, start.plan.train.load) == (None, 0, (), plan.train.load)


def test_auto_continues_what_the_text_file_names(plan: Plan) -> None:
    saves = make_saves(plan, 2, 4)
    start = start_of(plan)
    assert (start.save, start.iteration) == (saves.path_of(4), 4)
    assert start.plan.train.load == str(saves.path_of(4) / "actor")
    assert start.notes == (f"continuing {saves.path_of(4)} after iteration 4",)
    saves.begin_at(saves.path_of(2), 2)
    assert start_of(plan).iteration == 2


def test_what_is_not_taken_of_load_is_taken_of_the_runs_own_save(plan: Plan) -> None:
    """A run that begins with weights alone and is started again with the same file goes on with its own optimizer and random states."""
    make_saves(plan, 2)
    taken = {"no_load_optim": True, "no_load_rng": True}

    def left_out(**changes: object) -> tuple[bool, ...]:
        train = start_of(changed(plan, **taken, **changes)).plan.train
        return train.no_load_optim, train.no_load_rng

    assert left_out(finetune=True) == (False, False)
    assert left_out(finetune=False) == (True, True), "of a run that is continued, a user may leave them out"
    assert left_out(finetune=True, save="") == (True, True)


def test_auto_passes_over_what_is_not_whole_and_says_so(plan: Plan) -> None:
    saves = make_saves(plan, 2, 4)
    next((saves.path_of(4) / "actor").glob("*.distcp")).unlink()
    start = start_of(plan)
    assert start.iteration == 2
    assert start.notes[0].startswith(f"passed over: {saves.path_of(4)} is no whole training save: actor/") and len(start.notes) == 2


def test_auto_does_not_begin_anew_where_saves_are_and_none_is_whole(plan: Plan, tmp_path: Path) -> None:
    saves = make_saves(plan, 2, 4)
    elsewhere = make_saves(changed(plan, save=str(tmp_path / "elsewhere")), 2)
    for iteration in (2, 4):
        (saves.path_of(iteration) / STATE_FILE).unlink()
    for load in (plan.train.load, str(elsewhere.root)):
        line = refused(changed(plan, load=load))
        assert line.startswith(f"no save in {saves.root} is whole ({saves.path_of(4)} is no whole training save: ")
        assert f"{saves.path_of(2)} is no whole training save: " in line and "rl_config.resume=off" in line
    assert start_of(changed(plan, resume="off")).save is None
    assert start_of(changed(plan, resume=str(elsewhere.path_of(2)))).iteration == 2


def test_a_save_that_load_names_and_that_is_gone_is_not_replaced_by_another(plan: Plan, tmp_path: Path) -> None:
    saves = make_saves(plan, 4)
    line = refused(changed(plan, load=str(saves.path_of(2))))
    assert line == (
        f"actor_config.load is {saves.path_of(2)}, which does not exist, and rl_config.resume (auto) would continue {saves.path_of(4)}: "
        "correct load, or leave it out to continue"
    )
    # Weights that the run once began with are needed no more.
    assert start_of(changed(plan, load=str(tmp_path / "removed"))).iteration == 4


def test_off_never_continues(plan: Plan) -> None:
    saves = make_saves(plan, 2)
    assert start_of(changed(plan, resume="off")).save is None
    line = refused(changed(plan, resume="off", load=str(saves.root)))
    assert "rl_config.resume is off" in line and str(saves.root) in line and "finetune" in line
    start = start_of(changed(plan, resume="off", load=str(saves.root), finetune=True))
    assert (start.save, start.plan.train.load) == (None, str(saves.root))


def test_a_path_names_a_save(plan: Plan, tmp_path: Path) -> None:
    elsewhere = make_saves(changed(plan, save=str(tmp_path / "elsewhere")), 2, 4)
    make_saves(plan, 3)
    assert start_of(changed(plan, resume=str(elsewhere.root))).save == elsewhere.path_of(4)
    assert start_of(changed(plan, resume=str(elsewhere.path_of(2)))).save == elsewhere.path_of(2)
    assert "nowhere is not a folder" in refused(changed(plan, resume=str(tmp_path / "nowhere")))
    assert "no training save" in refused(changed(plan, resume=plan.train.hf_path))
    (elsewhere.path_of(4) / STATE_FILE).unlink()
    line = refused(changed(plan, resume=str(elsewhere.root)))
    assert line.startswith(f"rl_config.resume: {elsewhere.path_of(4)} is no whole training save") and TRACKER in line


def test_the_known_way_continues_what_load_names(plan: Plan, tmp_path: Path) -> None:
    loaded = make_saves(changed(plan, save=str(tmp_path / "loaded")), 2, 4)
    old = changed(plan, load=str(loaded.root))
    assert start_of(old).save == loaded.path_of(4)
    loaded.begin_at(loaded.path_of(2), 2)
    assert start_of(old).save == loaded.path_of(2)
    assert start_of(changed(old, save="")).save == loaded.path_of(2)
    new = start_of(changed(old, finetune=True))
    assert (new.save, new.iteration) == (None, 0)
    shorten = next((loaded.path_of(2) / "actor").glob("*.distcp"))
    shorten.write_bytes(shorten.read_bytes()[:-8])
    for how in (old, changed(old, finetune=True), changed(old, finetune=True, resume="off")):
        assert "actor_config.load: " in refused(how) and "bytes" in refused(how)
    own = make_saves(plan, 5)
    assert start_of(old).save == own.path_of(5)


def test_load_and_resume_may_not_mean_two_saves(plan: Plan) -> None:
    saves = make_saves(plan, 2, 4)
    assert start_of(changed(plan, load=str(saves.root))).iteration == 4
    line = refused(changed(plan, load=str(saves.path_of(2))))
    assert f"give rl_config.resume={saves.path_of(2)} to go back" in line
    assert "actor_config.finetune is true" in refused(changed(plan, load=str(saves.root), finetune=True))


def test_what_a_run_began_with_may_be_gone(plan: Plan, tiny_text: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_text, tmp_path / "base")
    plan = changed(plan, load=str(base))
    make_saves(plan, 2)
    shutil.rmtree(base)
    assert start_of(plan).iteration == 2
    assert "actor_config.load: " in refused(changed(plan, resume="off"))


def test_a_save_of_other_data_is_refused_before_any_worker(plan: Plan, tmp_path: Path) -> None:
    make_saves(plan, 2)
    assert [line.split(":")[0] for line in preflight(start_of(plan))] == ["weights", "saves", "data"]
    with pytest.raises(ValueError, match="can't continue in the data: the save has seed 7, this run has 8"):
        list(preflight(start_of(changed(plan, seed=8))))
    write_rows(tmp_path / "train.parquet", [row(text="Other?", images=[])])
    with pytest.raises(ValueError, match="can't continue in the data: the save has data files"):
        list(preflight(start_of(plan)))


# ---------------------------------------------------------------------- the reference of a KL term


def other_weights(folder: Path, copy: Path) -> Path:
    """A copy of a Hugging Face folder in which one number of one weight differs."""
    shutil.copytree(folder, copy)
    path = next(copy.glob("*.safetensors"))
    tensors = load_file(path)
    tensors[min(tensors)].view(-1)[0] += 1
    save_file(tensors, path)
    return copy


@pytest.fixture
def with_kl(plan: Plan, tiny_text: Path, tmp_path: Path) -> Plan:
    """Begins with a copy of its own of the model, which is the reference."""
    base = str(shutil.copytree(tiny_text, tmp_path / "base"))
    return changed(plan, kl_coef=0.1, load=base, reference_load=base)


def recorded(start: Start) -> dict[str, str]:
    return {"path": start.reference.path, "digest": start.reference.digest}


def test_a_reference_is_known_by_its_weights(with_kl: Plan, tiny_text: Path, tmp_path: Path) -> None:
    start = start_of(with_kl)
    assert start.reference.path == with_kl.train.load == start.plan.train.reference_load
    assert start.reference.digest == weight_digest(tiny_text, tiny_text)
    other = other_weights(tiny_text, tmp_path / "other")
    assert start.reference.digest != weight_digest(other, tiny_text)
    given = start_of(changed(with_kl, reference_load=str(other)))
    assert given.reference.digest == weight_digest(other, tiny_text)
    assert start_of(changed(with_kl, kl_coef=0.0)).reference is None


def test_a_resumed_kl_term_keeps_its_reference(with_kl: Plan, tmp_path: Path) -> None:
    reference = recorded(start_of(with_kl))
    saves = make_saves(with_kl, 2, reference=reference)
    for load in (with_kl.train.load, str(saves.root), str(tmp_path / "gone")):
        start = start_of(changed(with_kl, load=load, reference_load=load))
        assert (start.iteration, start.plan.train.reference_load) == (2, with_kl.train.load)
    moved = str(shutil.move(with_kl.train.load, tmp_path / "moved"))
    for load in (moved, str(saves.root)):
        start = start_of(changed(with_kl, load=load, reference_load=moved))
        assert start.plan.train.reference_load == moved


def test_a_changed_reference_is_refused_by_name(with_kl: Plan, tiny_text: Path, tmp_path: Path) -> None:
    saves = make_saves(with_kl, 2, reference=recorded(start_of(with_kl)))
    other = other_weights(tiny_text, tmp_path / "other")
    line = refused(changed(with_kl, reference_load=str(other)))
    assert "ref_model_load_path" in line and str(other) in line and with_kl.train.load in line and "sha256" in line
    shutil.rmtree(with_kl.train.load)
    for load in (with_kl.train.load, str(saves.root)):
        line = refused(changed(with_kl, load=load, reference_load=load))
        assert f"{with_kl.train.load} is not a folder" in line and "ref_model_load_path" in line
    shutil.move(other, with_kl.train.load)
    line = refused(with_kl)
    assert f"{with_kl.train.load} holds other weights now" in line


def test_a_kl_term_without_a_known_reference_is_refused(with_kl: Plan) -> None:
    """The save comes from a run without one."""
    saves = make_saves(with_kl, 2)
    line = refused(changed(with_kl, load=str(saves.root), reference_load=str(saves.root)))
    assert "is compared with a reference" in line and str(saves.path_of(2)) in line and "ref_model_load_path" in line
    assert start_of(with_kl).reference.path == with_kl.train.load
    named = changed(with_kl, load=str(saves.root))
    assert start_of(named).reference.path == with_kl.train.load


def test_a_weights_only_start_is_its_own_reference(with_kl: Plan, tmp_path: Path) -> None:
    loaded = make_saves(changed(with_kl, save=str(tmp_path / "loaded")), 4)
    start = start_of(changed(with_kl, load=str(loaded.root), reference_load=str(loaded.root), finetune=True))
    assert start.save is None and start.reference.path == str(loaded.path_of(4) / "actor")
    assert start.reference.digest == start_of(with_kl).reference.digest


# ---------------------------------------------------------------------- the command

CONFIG = """
megatron_training:
  stage: ray_dapo
  tokenizer_name_or_path: {model}
  data_path: {data}
  global_batch_size: 4
  train_iters: 4
  bf16: false
  seed: 7
actor_config:
  save: {save}
rl_config:
  output: {folder}/logs
  n_samples_per_prompt: 2
  max_prompt_length: 64
generate_config:
  sampling_config: {{max_tokens: 8}}
"""


@pytest.fixture
def config(plan: Plan, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    values = {"model": plan.train.hf_path, "data": plan.data.train_path, "save": plan.run.save, "folder": tmp_path}
    path.write_text(CONFIG.format(**values))
    return path


def train(config: Path, *arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["train", "--config", str(config), *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_a_finished_run_says_so_and_starts_nothing(plan: Plan, config: Path) -> None:
    saves = make_saves(plan, 4)
    leftover = saves.root / ".iter_0000005.5f0c.partial"
    leftover.mkdir()
    code, output, error = train(config)
    last = output.splitlines()[-1]
    assert (code, error) == (0, "")
    assert last == (
        f"nothing left to train: {saves.path_of(4)} is at iteration 4 and megatron_training.train_iters is 4; "
        "raise train_iters to go on, or give rl_config.resume=off to begin anew"
    )
    assert not leftover.exists() and not (config.parent / "logs").exists()


def test_a_dry_run_says_what_would_be_continued_and_changes_nothing(plan: Plan, config: Path) -> None:
    saves = make_saves(plan, 2)
    leftover = saves.root / ".iter_0000003.5f0c.partial"
    leftover.mkdir()
    code, output, _ = train(config, "--dry-run")
    assert code == 0 and f"continuing {saves.path_of(2)} after iteration 2" in output and "training save of iteration 2" in output
    assert leftover.exists()
    code, output, _ = train(config, "--dry-run", "rl_config.resume=off")
    assert code == 0 and "continuing" not in output


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("atuo", ["rl_config.resume", "atuo", "auto, off"]),
        ("true", ["rl_config.resume", "True"]),
        ("/nowhere/save", ["rl_config.resume", "/nowhere/save"]),
    ],
)
def test_a_wrong_value_of_resume(config: Path, value: str, words: list[str]) -> None:
    code, _, error = train(config, "--dry-run", f"rl_config.resume={value}")
    assert code == 2 and all(word in error for word in words), error
