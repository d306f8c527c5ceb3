"""YAML files, and those that they are built upon."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

_SHIPPED = Path(__file__).resolve().parents[2] / "examples/rl/configs"


def read_yaml(path: Path) -> dict[str, Any]:
    """Its sections; ValueError for anything else."""
    if path.is_dir():
        raise ValueError(f"configuration file {path} is a folder; name a YAML file in it")
    if not path.is_file():
        nearest = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], 1) if path.parent.is_dir() else []
        raise ValueError(f"configuration file {path} doesn't exist" + (f"; did you mean {path.parent / nearest[0]}?" if nearest else ""))
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} can't be read as YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold sections such as megatron_training: and rl_config:, not a {type(content).__name__}")
    return content


def compose(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file over those that its `defaults:` name (`- folder/name`), a later one over an earlier one, as in Hydra."""
    if path.resolve() in above:
        raise ValueError(f"{path}: defaults: {' -> '.join(file.stem for file in (*above, path))} goes in a circle; remove one of them")
    content = read_yaml(path)
    entries = content.get("defaults") or []
    if not isinstance(entries, list):
        raise ValueError(f"{path}: defaults must be a list, not {entries!r}")
    if wrong := [entry for entry in entries if not isinstance(entry, str | dict)]:
        raise ValueError(f"{path}: defaults: {wrong[0]!r} is neither the name of a file nor a line such as model: qwen25_7b")
    names = [entry.removesuffix(".yaml") + ".yaml" for entry in entries if isinstance(entry, str) and entry != "_self_"]
    # A copy that somebody made elsewhere still finds the shipped ones.
    places = [next((file for file in (path.parent / name, _SHIPPED / name) if file.is_file()), path.parent / name) for name in names]
    bases = [compose(place, (*above, path.resolve())) for place in places]
    models = [entry for part in (content, *bases[::-1]) for entry in part.get("defaults") or [] if isinstance(entry, dict)]
    return _merged(path, names, [*bases, content]) | {"defaults": models}


def _merged(path: Path, names: list[str], contents: list[dict[str, Any]]) -> dict[str, Any]:
    """A later one over an earlier one."""
    try:
        return OmegaConf.to_container(OmegaConf.merge(*contents), resolve=False)
    except (OmegaConfBaseException, TypeError) as error:
        told = ", ".join(name.removesuffix(".yaml") for name in names)
        raise ValueError(
            f"{path} can't be laid over its defaults ({told}): {one_line(error)}; does a list stand where the other has a section?"
        ) from error


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
