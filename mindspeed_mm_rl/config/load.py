"""From a YAML file and `a.b=c` overrides to a Config. Every mistake of the user is one ValueError that says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from mindspeed_mm_rl.config import known_keys
from mindspeed_mm_rl.config.composition import compose, one_line
from mindspeed_mm_rl.config.model_file import read_model
from mindspeed_mm_rl.config.profiler import ProfilerConfig
from mindspeed_mm_rl.config.schema import Config, EvalConfig, GenerateConfig, MegatronConfig, RLConfig
from mindspeed_mm_rl.config.spellings import SPELLINGS
from mindspeed_mm_rl.config.stages import has_critic

_ROLES = ("actor_config", "critic_config", "vit_config")
_SECTIONS: dict[str, type[BaseModel]] = {
    "megatron_training": MegatronConfig,
    **dict.fromkeys(_ROLES, MegatronConfig),
    "rl_config": RLConfig,
    "generate_config": GenerateConfig,
    "eval": EvalConfig,
    "profiler_config": ProfilerConfig,
}
_ACCEPTED_SECTIONS = ("msprobe_config",)
_TOP = (*_SECTIONS, *_ACCEPTED_SECTIONS, *known_keys.REFUSED_SECTIONS, "model", "defaults")
_HYDRA_OWN = ("hydra",)

Notes = dict[tuple[str, str], list[str]]
"""(section, reason) -> the keys that were accepted for it."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads and validates; paths of weights and data aren't opened here. Raises ValueError with one sentence."""
    path = Path(path).expanduser()
    tree = _read(path, overrides)
    _refuse_sections(tree)
    notes: Notes = {}
    architecture: dict[str, Any] = {}
    sections = {name: _sort_section(name, tree.get(name), model, notes, architecture) for name, model in _SECTIONS.items()}
    for name in _ACCEPTED_SECTIONS:
        _sort_section(name, tree.get(name), None, notes, architecture)
    megatron = sections["megatron_training"]
    # On its own first, so that a mistake is named where it stands.
    _validate(MegatronConfig, "megatron_training", megatron)
    actor, critic, vit = (_validate(MegatronConfig, role, megatron | sections[role]) for role in _ROLES)
    rl = _validate(RLConfig, "rl_config", sections["rl_config"])
    if sections["critic_config"] and not has_critic(actor.stage):
        notes[("critic_config", f"megatron_training.stage {actor.stage} has no critic")] = list(sections["critic_config"])
    if sections["vit_config"] and not rl.colocate_actor_and_vit:
        notes[("vit_config", known_keys.NO_VISION_WORKERS)] = list(sections["vit_config"])
    folder = path.resolve().parent
    model_name = (tree.get("megatron_training") or {}).get("model")
    return Config(
        name=path.stem,
        folder=str(folder),
        actor_config=actor,
        critic_config=critic,
        vit_config=vit,
        rl_config=rl,
        generate_config=_validate(GenerateConfig, "generate_config", sections["generate_config"]),
        eval=_validate(EvalConfig, "eval", sections["eval"]) if tree.get("eval") is not None else None,
        profiler_config=_validate(ProfilerConfig, "profiler_config", sections["profiler_config"]),
        model=read_model(tree.get("model"), tree.get("defaults"), folder, model_name),
        architecture=architecture,
        notes=tuple(f"{section}: {', '.join(dict.fromkeys(keys))}: {reason}" for (section, reason), keys in notes.items()),
    )


def _read(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    tree = OmegaConf.create(compose(path))
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals or not name.strip("+"):
            raise ValueError(f"'{override}' isn't an override: write section.key=value, for example rl_config.mini_batch_size=32")
        if not value.strip():
            raise ValueError(f"override '{override}' gives no value; write {name}=null for the default")
        try:
            tree.merge_with_dotlist([override.lstrip("+")])
        except (yaml.YAMLError, OmegaConfBaseException, AssertionError, TypeError) as error:
            raise ValueError(f"override '{override}' can't be applied: {one_line(error)}") from error
    try:
        content = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {error.full_key}: {str(error).splitlines()[0]}; write the value itself, or a key that exists") from error
    return {str(key): value for key, value in content.items()}


def _refuse_sections(tree: Mapping[str, Any]) -> None:
    for name, value in tree.items():
        if name in known_keys.REFUSED_SECTIONS and value:
            raise ValueError(f"section {name} isn't offered: {known_keys.REFUSED_SECTIONS[name]}")
        if name not in _TOP and name not in _HYDRA_OWN:
            raise ValueError(f"unknown section {name}" + _nearest(name, _TOP))


def _sort_section(name: str, content: Any, model: type[BaseModel] | None, notes: Notes, architecture: dict[str, Any]) -> dict[str, Any]:
    """Splits a section's keys by kind; returns those of the schema, respelled, null ones left out (null = the default)."""
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{name} must be a section of key: value lines, not {content!r}")
    family = "megatron_training" if model is MegatronConfig else name
    spellings = SPELLINGS.get(family, {})
    derived, refused = known_keys.DERIVED.get(family, {}), known_keys.NOT_OFFERED.get(family, {})
    acting: dict[str, Any] = {}
    given = {str(key).replace("-", "_"): value for key, value in content.items()}
    for key, value in given.items():
        target = spellings.get(key, key)
        if model is not None and target in model.model_fields:
            nested = _section_class(model, target)
            if nested is not None:
                value = _sort_section(f"{name}.{target}", value, nested, notes, architecture)
            if value is not None and (key == target or given.get(target) is None):
                acting[target] = value
        elif key in derived:
            notes.setdefault((family, derived[key]), []).append(key)
        elif family == "megatron_training" and key in known_keys.ARCHITECTURE:
            architecture[key] = value
        elif key in refused:
            _refuse(f"{name}.{key}", value, refused[key])
        elif f"{name}.{key}" in known_keys.DERIVED:
            _sort_section(f"{name}.{key}", value, None, notes, architecture)
        else:
            inner = [section.removeprefix(f"{name}.") for section in known_keys.DERIVED if section.startswith(f"{name}.")]
            known = [*(model.model_fields if model else ()), *derived, *refused, *spellings, *inner]
            raise ValueError(f"unknown key {name}.{key}" + (_in_another_section(key) or _nearest(key, known)))
    return acting


def _section_class(model: type[BaseModel], field: str) -> type[BaseModel] | None:
    annotation = model.model_fields[field].annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _refuse(key: str, value: Any, rule: known_keys.NotOffered) -> None:
    if value is not None and not any(value == neutral for neutral in rule.neutral):
        raise ValueError(f"{key}: {value} isn't offered in this version; {rule.instead}")


def _in_another_section(key: str) -> str:
    """Empty when no section has a key of exactly this name."""
    for section, model in _SECTIONS.items():
        inner = {field: nested for field in model.model_fields if (nested := _section_class(model, field)) is not None}
        for path, fields in (
            (section, model.model_fields),
            *((f"{section}.{field}", nested.model_fields) for field, nested in inner.items()),
        ):
            if key in fields:
                return f"; did you mean {path}.{key}?"
    return ""


def _nearest(name: str, known: Iterable[str]) -> str:
    return f"; did you mean {difflib.get_close_matches(name, known, 1, cutoff=0.0)[0]}?"


def _validate(model: type[BaseModel], name: str, values: dict[str, Any]) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join([name, *(str(part) for part in problem["loc"])])
        raise ValueError(f"{key}: {problem['input']!r} isn't allowed; {_rule(model, problem)}") from error


def _rule(model: type[BaseModel], problem: Mapping[str, Any]) -> str:
    text = str(problem["msg"]).removeprefix("Input should be ")
    field = model.model_fields.get(str(problem["loc"][0])) if problem["loc"] else None
    choices = [str(choice) for choice in _literal_choices(field.annotation if field else None)]
    if choices:
        close = difflib.get_close_matches(str(problem["input"]), choices, 1)
        return f"choose {', '.join(choices)}" + (f" (did you mean {close[0]}?)" if close else "")
    return f"it must be {text}"


def _literal_choices(annotation: Any) -> tuple[Any, ...]:
    for part in (annotation, *get_args(annotation)):
        if get_origin(part) is not None and str(get_origin(part)) == "typing.Literal":
            return get_args(part)
    return ()
