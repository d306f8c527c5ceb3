"""Folders of weights: what a folder holds is recognised by its content, tensors are read when they are asked for."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mindspeed_mm_rl.config.model_file import read_json
from mindspeed_mm_rl.models.names import PARTS, Part, has_value_head
from mindspeed_mm_rl.models.saved_weights import METADATA_FILE, SavedWeights
from mindspeed_mm_rl.models.weight_layout import check_hf_shapes, check_megatron_shapes, select_megatron, to_megatron

FolderKind = Literal["hf", "mm", "training"]

ITERATION_FILE = "latest_checkpointed_iteration.txt"
RELEASE = "release"
RANK_FOLDER = "mp_rank_00"
MODEL_FILE = "model_optim_rng.pt"
ACTOR_FOLDER = "actor"
CRITIC_FOLDER = "critic"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_THE_KINDS = (
    "a Hugging Face folder (config.json and *.safetensors), the output of mm-convert (latest_checkpointed_iteration.txt saying release), "
    "or a training save (latest_checkpointed_iteration.txt saying an iteration)"
)


@dataclass(frozen=True)
class WeightFolder:
    """What `recognise` found. Example: WeightFolder("training", Path("ckpt/iter_0000010/actor"), 10)."""

    kind: FolderKind
    weights: Path
    """hf: the folder itself; mm: the .pt file; training: the torch_dist folder of the actor or the critic."""
    iteration: int | None = None
    """Of a training save."""


class HuggingFaceWeights(Mapping[str, Tensor]):
    """The safetensors files of a Hugging Face folder, one or many; ValueError when one is missing or damaged, or a name is there twice."""

    def __init__(self, folder: Path) -> None:
        self._handles = {path: _open_safetensors(path) for path in _safetensors_files(folder)}
        self._files: dict[str, Path] = {}
        for path, handle in self._handles.items():
            for name in handle.keys():  # noqa: SIM118  safe_open is no mapping
                if name in self._files:
                    raise ValueError(f"{folder}: {name} is in {self._files[name].name} and in {path.name}; keep one set of weight files")
                self._files[name] = path
        self.shapes = {name: tuple(self._handles[path].get_slice(name).get_shape()) for name, path in self._files.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._handles[self._files[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class MegatronWeights(Mapping[str, Tensor]):
    """The `model` of a model_optim_rng.pt, mapped into memory; raises ValueError when the file is damaged or holds something else."""

    def __init__(self, path: Path) -> None:
        self._tensors = _read_model_file(path)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


Weights = HuggingFaceWeights | MegatronWeights | SavedWeights


def recognise(folder: str | Path, role: str = ACTOR_FOLDER) -> WeightFolder:
    """Says what kind of weights a folder holds and where; raises ValueError with what was looked for when it holds none.

    A save's text file picks its iteration and `role` what in it is meant, the actor or the critic; `iter_NNNNNNN`, a role's folder in it,
    and `release` may also be given themselves.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; weights are {_THE_KINDS}")
    has_hf = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    has_iterations = (path / ITERATION_FILE).is_file()
    if has_hf and has_iterations:
        raise ValueError(
            f"{path} holds both *.safetensors and {ITERATION_FILE}: which of the two is meant? Keep them in folders of their own"
        )
    if has_hf:
        return WeightFolder("hf", path)
    if has_iterations:
        return _in_iteration(path / _iteration_folder(path), role)
    if (path / METADATA_FILE).is_file():
        return WeightFolder("training", path, _iteration_number(path.parent))
    if _holds_iteration(path):
        return _in_iteration(path, role)
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "nothing"
    raise ValueError(f"{path} holds no weights that can be read (found: {found}); weights are {_THE_KINDS}")


def open_weights(found: WeightFolder) -> Weights:
    """The tensors of a recognised folder by their names there (hf: Hugging Face names; mm, training: megatron names)."""
    match found.kind:
        case "hf":
            return HuggingFaceWeights(found.weights)
        case "mm":
            return MegatronWeights(found.weights)
        case "training":
            return SavedWeights(found.weights)


def read_weights(folder: str | Path) -> Weights:
    return open_weights(recognise(folder))


def read_megatron_weights(folder: str | Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Exactly the megatron weights that config.json describes, from any kind of folder; names and shapes are checked before one is read.

    Raises ValueError when the folder holds no weights, or those of another model.
    """
    found = recognise(folder, _role(config))
    weights = open_weights(found)
    _check(found, weights, config, PARTS)
    return to_megatron(weights, config) if found.kind == "hf" else select_megatron(weights, config)


def check_weights(folder: str | Path, config: Mapping[str, Any], parts: tuple[Part, ...] = PARTS) -> WeightFolder:
    """Names and shapes of a folder's weights against config.json; reads headers only. Raises ValueError naming folder and weight."""
    found = recognise(folder, _role(config))
    _check(found, open_weights(found), config, parts)
    return found


def _role(config: Mapping[str, Any]) -> str:
    return CRITIC_FOLDER if has_value_head(config) else ACTOR_FOLDER


def _check(found: WeightFolder, weights: Weights, config: Mapping[str, Any], parts: tuple[Part, ...]) -> None:
    check = check_hf_shapes if found.kind == "hf" else check_megatron_shapes
    try:
        check(weights.shapes, config, parts)
    except ValueError as error:
        raise ValueError(f"{found.weights}: {error}") from error


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder; ValueError when it is missing or no JSON object."""
    path = Path(folder).expanduser() / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a Hugging Face folder")
    return read_json(path)


def _iteration_folder(path: Path) -> str:
    text = (path / ITERATION_FILE).read_text().strip()
    if text != RELEASE and not text.isdigit():
        raise ValueError(f"{path / ITERATION_FILE} says {text!r}; it must say {RELEASE} or an iteration number")
    name = RELEASE if text == RELEASE else f"iter_{int(text):07d}"
    if not (path / name).is_dir():
        there = ", ".join(sorted(entry.name for entry in path.iterdir() if entry.is_dir())) or "no folder"
        raise ValueError(
            f"{path / ITERATION_FILE} says {text} but {path / name} does not exist (there: {there}); write one of those into it"
        )
    return name


def _holds_iteration(path: Path) -> bool:
    return (path / ACTOR_FOLDER / METADATA_FILE).is_file() or any(path.glob(f"mp_rank_*/{MODEL_FILE}"))


def _in_iteration(path: Path, role: str) -> WeightFolder:
    if (path / role / METADATA_FILE).is_file():
        return WeightFolder("training", path / role, _iteration_number(path))
    ranks = sorted(file.parent.name for file in path.glob(f"mp_rank_*/{MODEL_FILE}"))
    if ranks == [RANK_FOLDER]:
        return WeightFolder("mm", path / RANK_FOLDER / MODEL_FILE)
    if ranks:
        raise ValueError(f"{path} is split over {len(ranks)} ranks ({', '.join(ranks[:4])}); only tp 1, pp 1 ({RANK_FOLDER}) can be read")
    without = ", or its run had no critic" if role == CRITIC_FOLDER else ""
    raise ValueError(f"{path} holds neither {role}/{METADATA_FILE} nor {RANK_FOLDER}/{MODEL_FILE}: the save is incomplete{without}")


def _iteration_number(path: Path) -> int | None:
    number = path.name.removeprefix("iter_")
    return int(number) if number.isdigit() else None


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if not index.is_file():
        single = folder / SINGLE_FILE
        return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is not a safetensors index ({error!r})") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{index} names {len(missing)} of {len(names)} files that do not exist ({', '.join(missing[:4])}); fetch the model again"
        )
    return [folder / name for name in names]


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); fetch the model again") from error


def _read_model_file(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is damaged, or holds more than weights, which is never unpickled ({reason})") from error
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise ValueError(f"{path} has no `model`: only files of one pipeline stage without virtual stages can be read")
    return {name: tensor for name, tensor in model.items() if isinstance(tensor, Tensor)}
