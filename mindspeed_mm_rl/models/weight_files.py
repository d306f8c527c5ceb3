"""Folders of weights: what a folder holds is recognised by its content, tensors are read when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mindspeed_mm_rl.config.model_file import read_json
from mindspeed_mm_rl.models.names import PARTS, Part, has_value_head
from mindspeed_mm_rl.models.rank_files import MODEL_FILE, RankWeights
from mindspeed_mm_rl.models.saved_weights import METADATA_FILE, SavedWeights
from mindspeed_mm_rl.models.torch_files import read_models
from mindspeed_mm_rl.models.weight_layout import check_hf_shapes, check_megatron_shapes, select_megatron, to_megatron

FolderKind = Literal["hf", "mm", "ranks", "training"]

ITERATION_FILE = "latest_checkpointed_iteration.txt"
RELEASE = "release"
RANK_FOLDER = "mp_rank_00"
ACTOR_FOLDER = "actor"
CRITIC_FOLDER = "critic"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_PREFIXES = ("text_decoder.", "image_encoder.")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
_THE_KINDS = (
    "a Hugging Face folder (config.json and *.safetensors), the output of mm-convert (latest_checkpointed_iteration.txt saying release), "
    "or a training save (latest_checkpointed_iteration.txt saying an iteration)"
)


@dataclass(frozen=True)
class WeightFolder:
    """What `recognise` found. Example: WeightFolder("training", Path("ckpt/iter_0000010/actor"), 10)."""

    kind: FolderKind
    weights: Path
    """hf: the folder itself; mm: the .pt file; ranks: the folder of the mp_rank_* folders; training: the torch_dist folder of a role."""
    iteration: int | None = None
    """Of a training save."""

    @property
    def ranks(self) -> Path:
        """The folder of the mp_rank_* folders, of mm and ranks."""
        return self.weights.parents[1] if self.kind == "mm" else self.weights


class HuggingFaceWeights(Mapping[str, Tensor]):
    """The safetensors files of a Hugging Face folder, or one such file.

    Raises ValueError when one is missing or damaged, or a name is there twice.
    """

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

    def file(self, name: str) -> Path:
        return self._files[name]

    def part(self, name: str, index: int) -> Tensor:
        """The index-th of a stack of tensors, alone."""
        return self._handles[self._files[name]].get_slice(name)[index]

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._handles[self._files[name]].get_slice(name).get_dtype()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class MegatronWeights(Mapping[str, Tensor]):
    """The `model` of a model_optim_rng.pt, mapped into memory; raises ValueError when the file is damaged or holds something else."""

    def __init__(self, path: Path) -> None:
        models = read_models(path)
        self._tensors = next(iter(models.values()))
        self.is_whole = set(models) == {"model"} and any(name.startswith(_PREFIXES) for name in self._tensors)
        """False for the names of MindSpeed-LLM and for virtual stages, which RankWeights reads."""
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
        case "ranks":
            raise ValueError(f"{found.weights} is split over several ranks; mm-convert resplit makes one of them")


def read_weights(folder: str | Path) -> Weights:
    return open_weights(recognise(folder))


def read_megatron_weights(folder: str | Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Exactly the megatron weights that config.json describes, from any kind of folder; names and shapes are checked before one is read.

    Raises ValueError when the folder holds no weights, or those of another model.
    """
    found = recognise(folder, role_of(config))
    if needs_layout(found):
        return to_megatron(RankWeights(found.ranks, config), config)
    weights = open_weights(found)
    _check(found, weights, config, PARTS)
    return to_megatron(weights, config) if found.kind == "hf" else select_megatron(weights, config)


def check_weights(folder: str | Path, config: Mapping[str, Any], parts: tuple[Part, ...] = PARTS) -> WeightFolder:
    """Names and shapes of a folder's weights against config.json; reads headers only. Raises ValueError naming folder and weight."""
    found = recognise(folder, role_of(config))
    if needs_layout(found):
        check_parts(folder, RankWeights(found.ranks, config).parts, parts)
    else:
        _check(found, open_weights(found), config, parts)
    return found


def check_parts(folder: str | Path, parts: Sequence[Part], wanted: Sequence[Part]) -> None:
    """Raises ValueError for a folder of the vision encoder alone where the rest of the model is wanted too."""
    if not set(wanted) <= set(parts):
        raise ValueError(f"{folder} holds the vision encoder alone: that is for vit_config.load; give a folder of the whole model here")


def needs_layout(found: WeightFolder) -> bool:
    """Whether the names in the files are those of one rank of several, or of MindSpeed-LLM, so that RankWeights must put them together."""
    return found.kind == "ranks" or (found.kind == "mm" and not MegatronWeights(found.weights).is_whole)


def role_of(config: Mapping[str, Any]) -> str:
    """The folder in a save of a model with this config.json."""
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
        return WeightFolder("ranks", path)
    if (path / METADATA_FILE).is_file():
        return WeightFolder("training", path, _iteration_number(path))
    without = ", or its run had no critic" if role == CRITIC_FOLDER else ""
    raise ValueError(f"{path} holds neither {role}/{METADATA_FILE} nor {RANK_FOLDER}/{MODEL_FILE}: the save is incomplete{without}")


def _iteration_number(path: Path) -> int | None:
    number = path.name.removeprefix("iter_")
    return int(number) if number.isdigit() else None


def _safetensors_files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
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
