"""The two conversions: Hugging Face -> MindSpeed-MM layout, and MindSpeed-MM layout or training save -> Hugging Face."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from torch import Tensor

from checkpoint.layouts import check_target, copy_side_files, new_folder, write_config, write_mm, write_safetensors
from checkpoint.options import HfToMmOptions, MmToHfOptions, check_layout
from mindspeed_mm_rl.models.names import PARTS, Part, entries, has_value_head, with_value_head
from mindspeed_mm_rl.models.weight_files import FolderKind, check_weights, open_weights, read_config
from mindspeed_mm_rl.models.weight_layout import iterate_megatron, to_hf

_VISION_PARTS: tuple[Part, ...] = ("vision", "projector")


def hf_to_mm(cfg: HfToMmOptions) -> None:
    """Writes a Hugging Face model in the MindSpeed-MM layout, for actor_config.load, reference and vit_config.load.

    Raises ValueError, before anything is written, when layout, weights and config.json do not agree.
    """
    source, target = Path(cfg.hf_config.hf_dir).expanduser(), Path(cfg.mm_dir).expanduser()
    config = _read_config(source, cfg.orm)
    check_layout(cfg.parallel_config, cfg.common_model_config, config, cfg.hf_config.hf_dir)
    parts = _VISION_PARTS if cfg.save_vit_only else PARTS
    if cfg.save_vit_only and "vision_config" not in config:
        raise ValueError(f"save_vit_only is true but the model in {source} ({config.get('model_type')}) has no vision encoder")
    check_target(target)
    found = check_weights(source, config, parts)
    _expect(("hf",), found.kind, source, "hf_to_mm reads a Hugging Face folder")
    tensors = iterate_megatron(open_weights(found), config, parts)
    with new_folder(target) as folder:
        # torch.save takes one object: the whole model is in memory here, as it is in the reader.
        write_mm(folder, dict(_with_progress(tensors, _count(config, parts, "mm"), "hf_to_mm")))
    print(f"wrote {target} ({'the vision encoder alone' if cfg.save_vit_only else 'load it as actor_config.load'})")


def mm_to_hf(cfg: MmToHfOptions) -> None:
    """Writes a Hugging Face folder from the MindSpeed-MM layout or a training save; other files are copied from hf_config.hf_dir.

    Raises ValueError, before anything is written, when layout, weights and config.json do not agree.
    """
    source, target, hf_dir = (Path(name).expanduser() for name in (cfg.mm_dir, cfg.save_hf_dir, cfg.hf_config.hf_dir))
    config = _read_config(hf_dir, cfg.orm)
    if has_value_head(config) and "vision_config" in config:
        raise ValueError(
            f"Hugging Face has no sequence classification class for {config['model_type']}: a critic of it stays as it was saved"
        )
    check_layout(cfg.parallel_config, cfg.common_model_config, config, cfg.hf_config.hf_dir)
    check_target(target)
    found = check_weights(source, config)
    _expect(("mm", "training"), found.kind, source, "mm_to_hf reads the output of hf_to_mm or a training save")
    tensors = to_hf(open_weights(found), config)
    with new_folder(target) as folder:
        write_safetensors(folder, _with_progress(tensors, _count(config, PARTS, "hf"), "mm_to_hf"))
        copy_side_files(hf_dir, folder)
        if cfg.orm:
            write_config(folder, config)
    print(f"wrote {target} from {found.weights} ({found.kind})")


def _read_config(folder: Path, orm: bool) -> dict[str, Any]:
    config = read_config(folder)
    return with_value_head(config) if orm else config


def _expect(kinds: tuple[FolderKind, ...], found: FolderKind, folder: Path, rule: str) -> None:
    if found not in kinds:
        raise ValueError(f"{rule}, but {folder} is of kind {found!r}")


def _count(config: Mapping[str, Any], parts: tuple[Part, ...], side: str) -> int:
    return sum(1 if side == "mm" else len(entry.hf) for entry in entries(config) if entry.part in parts)


def _with_progress(tensors: Iterable[tuple[str, Tensor]], total: int, title: str) -> Iterator[tuple[str, Tensor]]:
    return iter(track(tensors, description=title, total=total, console=Console(stderr=True)))
