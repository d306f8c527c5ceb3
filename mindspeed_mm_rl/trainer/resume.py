"""Where a run begins: at a save that is whole, or with the weights of actor_config.load.

resume auto --newest whole save of actor_config.save--> continue it ---.
resume PATH --that save, or an error------------------> continue it ----+--> Start: the save, and the reference that it was trained with
otherwise: actor_config.load --a training save--------> continue it ---'
                             '-any other weights, or finetune--> a new run
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.models.saved_weights import METADATA_FILE, VISION_FOLDER
from mindspeed_mm_rl.models.value_weights import check_same_vision
from mindspeed_mm_rl.models.weight_digest import weight_digest
from mindspeed_mm_rl.models.weight_files import CRITIC_FOLDER, WeightFolder, read_config, recognise
from mindspeed_mm_rl.models.weight_sources import VISION_PARTS, Source, different_vision, source_of
from mindspeed_mm_rl.trainer.save_folder import ACTOR_FOLDER, TRACKER, SaveFolder, check_whole

_DIGITS_SHOWN = 12


@dataclass(frozen=True)
class Reference:
    """Weights that the policy is compared with. Example: Reference("/ckpt/mm/release", "5f0c...")."""

    path: str
    digest: str
    """sha256 of models/weight_digest.py."""

    @property
    def short(self) -> str:
        return f"sha256 {self.digest[:_DIGITS_SHOWN]}"


@dataclass(frozen=True)
class Start:
    """A decision. Example: Start(plan) is a new run; Start(plan, Path("ckpt/dapo/iter_0000050"), 50, contents)."""

    plan: Plan
    """train.load and train.reference_load are where the weights really come from."""
    save: Path | None = None
    """The save that is continued."""
    iteration: int = 0
    contents: dict[str, Any] = field(default_factory=dict)
    """state.json of the save."""
    reference: Reference | None = None
    """None where the policy isn't compared with any."""
    notes: tuple[str, ...] = ()
    """What a user should see of the decision, a sentence each."""

    @property
    def is_finished(self) -> bool:
        return self.iteration >= self.plan.run.train_iters

    @property
    def finished_line(self) -> str:
        return (
            f"nothing left to train: {self.save} is at iteration {self.iteration} and megatron_training.train_iters is "
            f"{self.plan.run.train_iters}; raise train_iters to go on, or give rl_config.resume=off to begin anew"
        )


def start_of(plan: Plan) -> Start:
    """Decides, and checks what was decided. Reads only.

    Raises ValueError when a save that is asked for isn't whole, and when a reference is needed that isn't known or has changed.
    """
    save, passed_over = _chosen(plan)
    notes = tuple(f"passed over: {reason}" for reason in passed_over)
    if save is None:
        if _training_save(plan.train.load) is not None:
            _whole("actor_config.load", plan.train.load)
        _check_critic(plan)
        start = Start(plan, notes=(*notes, *_vision_notes(plan)))
    else:
        contents = check_whole(save)
        # With finetune these are left out of actor_config.load; a run that is started again goes on with all of its own.
        whole = {"no_load_optim": False, "no_load_rng": False} if plan.train.finetune else {}
        train = replace(plan.train, load=str(save / ACTOR_FOLDER), finetune=False, **whole)
        iteration = int(contents["iteration"])
        said = f"continuing {save} after iteration {iteration}"
        critic = None if plan.critic is None else replace(plan.critic, load=_critic_of(save, contents), **whole)
        _check_placement(save, contents, plan)
        _check_trained(save, contents, plan)
        _check_data(save, contents, plan)
        vision = None if plan.vision is None else replace(plan.vision, load=str(save / VISION_FOLDER), **whole)
        changed = replace(plan, train=train, critic=critic, vision=vision)
        if not _shared_vision(contents):
            _check_critic(changed)
        start = Start(changed, save, iteration, contents, notes=(*notes, said))
    if start.is_finished or not plan.needs_reference:
        return start
    reference = _reference(plan, start)
    train = replace(start.plan.train, reference_load=reference.path)
    vision = start.plan.vision and replace(start.plan.vision, reference_load=reference.path)
    return replace(start, reference=reference, plan=replace(start.plan, train=train, vision=vision))


def _critic_of(save: Path, contents: dict[str, Any]) -> str:
    """Raises ValueError when the save has none."""
    if f"{CRITIC_FOLDER}/{METADATA_FILE}" not in contents["files"]:
        raise ValueError(
            f"{save} has no critic: it was written by another algorithm than megatron_training.stage ray_ppo, which needs one; begin a new "
            "run with its weights (actor_config.finetune=true, and an actor_config.save of its own)"
        )
    return str(save / CRITIC_FOLDER)


def _shared_vision(contents: dict[str, Any]) -> bool:
    """Whether the run that wrote a save had frozen its vision encoder too, so that actor and critic have the same."""
    train = contents.get("plan", {}).get("train", {})
    return bool(train.get("freeze_vision") and train.get("freeze_projector"))


def _check_critic(plan: Plan) -> None:
    """Raises ValueError when a vision encoder that is shared, as it is frozen, isn't the same in actor and critic."""
    critic = plan.critic
    if critic is None or not (critic.freeze_vision and critic.freeze_projector):
        return
    shared = (plan.vision or plan.train).load
    # Of a training save the one begins as its critic, the other as its actor.
    if critic.load == shared and _training_save(critic.load) is None:
        return
    try:
        check_same_vision(critic.load, shared, read_config(critic.hf_path))
    except ValueError as error:
        raise ValueError(f"critic_config.load: {error}") from error


def _check_placement(save: Path, contents: dict[str, Any], plan: Plan) -> None:
    """A save is continued with the vision encoder where it was: its optimizer is part of the network that it is in."""
    was_apart = f"{VISION_FOLDER}/{METADATA_FILE}" in contents["files"]
    if was_apart != (plan.vision is not None):
        was, now = (str(value).lower() for value in (was_apart, not was_apart))
        raise ValueError(
            f"{save} was written with rl_config.colocate_actor_and_vit={was}, but this run has {now}: set it to {was}, or begin a new run "
            "with its weights (actor_config.finetune=true, and an actor_config.save of its own)"
        )


def _check_trained(save: Path, contents: dict[str, Any], plan: Plan) -> None:
    """The optimizer of a save has no moments of what was frozen."""
    was, own = contents.get("plan", {}).get("train", {}), plan.train
    begins_anew = own.no_load_optim and not own.finetune and plan.vision is None
    for part, name in (("freeze_vision", "vision_encoder"), ("freeze_projector", "vision_projector")):
        if was.get(part) and not getattr(own, part) and not begins_anew:
            raise ValueError(
                f"{save} was written with a frozen {name}, which this run trains (freeze: false in the model file), so its optimizer knows "
                "nothing of it: freeze it again, or begin a new run with the weights of the save (actor_config.finetune=true, and an "
                "actor_config.save of its own)"
            )


def _check_data(save: Path, contents: dict[str, Any], plan: Plan) -> None:
    """A position among prompts says nothing of one among pairs."""
    was_on_pairs = "pairs" in contents["data"]
    if was_on_pairs != (plan.preference is not None):
        was, now = ("pairs", "prompts") if was_on_pairs else ("prompts", "pairs")
        raise ValueError(
            f"{save} was trained on {was}, but this run trains on {now}: take another megatron_training.stage, or begin a new run with its "
            "weights (actor_config.finetune=true, and an actor_config.save of its own)"
        )


def _vision_notes(plan: Plan) -> tuple[str, ...]:
    """Of a new run with vision workers. Raises ValueError where the policy would be compared with another encoder's."""
    vision, train = plan.vision, plan.train
    if vision is None:
        return ()
    config, is_given = read_config(train.hf_path), train.reference_load != train.load
    keys = {vision.load: "vit_config.load", train.reference_load: plan.reference_key, train.load: "actor_config.load"}
    own = _vision_of(keys, vision.load, config)

    def differs_from(load: str) -> str:
        return "" if load == vision.load else different_vision(own, _vision_of(keys, load, config), config)

    # A frozen encoder serves the reference too; one that is trained has a reference of its own, which the user may choose.
    is_compared = plan.needs_reference and is_given == plan.rollout.image_embeds
    if is_compared and (name := differs_from(train.reference_load)):
        key = keys[train.reference_load]
        raise ValueError(
            f"{name} of the vision encoder in {vision.load} differs from that in {train.reference_load} ({key}), with which the policy "
            f"is compared: give a reference with the same vision encoder in {plan.reference_key}, or take none (rl_config.init_kl_coef=0)"
        )
    if differs_from(train.load):
        return (f"the vision encoder is that of vit_config.load ({vision.load}); actor_config.load ({train.load}) holds another one",)
    return ()


def _vision_of(keys: dict[str, str], folder: str, config: dict[str, Any]) -> Source:
    """keys: folder -> the user's key that names it."""
    try:
        return source_of(folder, config, VISION_PARTS)
    except ValueError as error:
        raise ValueError(f"{keys[folder]}: {error}") from error


def _chosen(plan: Plan) -> tuple[Path | None, list[str]]:
    """The save to continue, and why others were passed over."""
    run = plan.run
    if run.resume == "off":
        if _continues_load(plan):
            raise ValueError(
                f"rl_config.resume is off, but actor_config.load ({plan.train.load}) is a training save, which is continued unless "
                "actor_config.finetune is true: set finetune to true to take its weights alone, or resume to auto"
            )
        return None, []
    if run.resume != "auto":
        if not Path(run.resume).is_dir():
            raise ValueError(f"rl_config.resume: {run.resume} is not a folder; give auto, off, or the folder of a training save")
        return _whole("rl_config.resume", run.resume), []
    newest, passed_over = SaveFolder(Path(run.save)).newest_whole() if run.save else (None, [])
    if newest is not None:
        _check_one_meaning(plan, newest)
        return newest, passed_over
    if passed_over:
        raise ValueError(
            f"no save in {run.save} is whole ({'; '.join(passed_over)}): mend one, give another save in rl_config.resume, or "
            "rl_config.resume=off to begin anew"
        )
    return (_whole("actor_config.load", plan.train.load) if _continues_load(plan) else None), []


def _continues_load(plan: Plan) -> bool:
    """Whether actor_config.load is a training save that is meant as one."""
    return not plan.train.finetune and _recognised("actor_config.load", plan.train.load).kind == "training"


def _recognised(key: str, folder: str) -> WeightFolder:
    try:
        return recognise(folder)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _whole(key: str, folder: str) -> Path:
    """The whole training save that a user's key names."""
    found = _recognised(key, folder)
    if found.kind != "training":
        raise ValueError(f"{key}: {folder} holds weights to begin with and no training save; give it to actor_config.load")
    save = found.weights.parent
    try:
        check_whole(save)
    except ValueError as error:
        raise ValueError(f"{key}: {error}; name another save in {TRACKER}, or its iter_ folder in {key}") from error
    return save


def _check_one_meaning(plan: Plan, newest: Path) -> None:
    """actor_config.load may name a save among those of actor_config.save, but then it must be the one that is continued."""
    given = Path(plan.train.load).expanduser()
    if not given.exists() and given.resolve().is_relative_to(newest.resolve().parent):
        raise ValueError(
            f"actor_config.load is {plan.train.load}, which does not exist, and rl_config.resume (auto) would continue {newest}: correct "
            "load, or leave it out to continue"
        )
    loaded = _training_save(plan.train.load)
    if loaded is None or loaded.resolve().parent != newest.resolve().parent:
        return
    if plan.train.finetune:
        raise ValueError(
            f"actor_config.finetune is true and actor_config.load is {loaded}, but rl_config.resume (auto) continues {newest} of the same "
            "folder: set resume to off to begin anew with the weights alone, or finetune to false to continue"
        )
    if loaded.name in Path(plan.train.load).parts and loaded.resolve() != newest.resolve():
        raise ValueError(
            f"actor_config.load is {loaded}, but rl_config.resume (auto) continues {newest}: "
            f"give rl_config.resume={loaded} to go back to it"
        )


def _training_save(folder: str) -> Path | None:
    """None also for a folder that is gone: a run that is continued doesn't need it any more."""
    try:
        found = recognise(folder)
    except ValueError:
        return None
    return found.weights.parent if found.kind == "training" else None


def _reference(plan: Plan, start: Start) -> Reference:
    """plan: the user's, in which reference_load is `load` unless it was given."""
    train = plan.train
    given = train.reference_load if train.reference_load != train.load else ""
    # A save in the middle of a run is no reference of its own.
    base = train.load if train.finetune or _training_save(train.load) is None else ""
    recorded = Reference(**start.contents["reference"]) if start.contents.get("reference") else None
    if recorded is None:
        if not given and not base:
            raise ValueError(
                f"the policy is compared with a reference, but {start.save} doesn't say which: give the weights that training began with "
                f"in {plan.reference_key}"
            )
        return _digested(plan.reference_key if given else "actor_config.load", given or base, train.hf_path)
    if not given:
        return _remembered(recorded, base, start, train.hf_path)
    found = _digested(plan.reference_key, given, train.hf_path)
    if found.digest != recorded.digest:
        raise ValueError(
            f"{plan.reference_key}: the weights in {given} ({found.short}) are not those that {start.save} was trained with, "
            f"{recorded.path} ({recorded.short}): give those, or begin anew with another reference (actor_config.finetune=true)"
        )
    return found


def _digested(key: str, folder: str, hf_path: str) -> Reference:
    found = _recognised(key, folder)
    # The file of mm-convert lies two folders below the one that can be given.
    path = found.ranks if found.kind == "mm" else found.weights
    try:
        return Reference(str(path), weight_digest(path, hf_path))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _remembered(recorded: Reference, base: str, start: Start, hf_path: str) -> Reference:
    """The recorded reference where its weights still are: at its path, or in actor_config.load."""
    reasons = []
    for path in dict.fromkeys(path for path in (recorded.path, base) if path):
        try:
            found = _digested(path, path, hf_path)
        except ValueError as error:
            reasons.append(str(error))
            continue
        if found.digest == recorded.digest:
            return found
        reasons.append(f"{path} holds other weights now ({found.short})")
    raise ValueError(
        f"the reference that {start.save} was trained with, {recorded.path} ({recorded.short}), is gone: {'; '.join(reasons)}. Put it "
        f"back, or give a copy of it in {start.plan.reference_key}"
    )
