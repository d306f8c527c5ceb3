"""What a run must remember to go on as if it had never stopped: written into each save, and taken from one."""

from __future__ import annotations

import errno
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mindspeed_mm_rl.algorithms.kl import KLController
from mindspeed_mm_rl.config.plan import Plan, TrainPlan
from mindspeed_mm_rl.data.loader import RowLoader
from mindspeed_mm_rl.models.names import PARTS, Part, entries, with_value_head
from mindspeed_mm_rl.models.weight_files import read_config
from mindspeed_mm_rl.models.weight_sources import VISION_PARTS
from mindspeed_mm_rl.trainer.best import Best, remembered_best
from mindspeed_mm_rl.trainer.resume import Start
from mindspeed_mm_rl.trainer.save_folder import SaveFolder, write_state
from mindspeed_mm_rl.workers.group import TrainGroup

_VERSIONS_OF = ("torch", "megatron-core", "ray", "transformers")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class RunState:
    start: Start
    iteration: int = 0
    """Iterations that are finished."""
    best: Best | None = None
    """Of the saves, in evaluation."""

    @property
    def plan(self) -> Plan:
        return self.start.plan

    def save(self, trainers: Mapping[str, TrainGroup], loader: RowLoader, kl: KLController) -> Path:
        """Returns the folder. trainers: by their folder in the save.

        Raises RuntimeError, and leaves the earlier saves as they are, when the save cannot be written.
        """
        saves = SaveFolder(Path(self.plan.run.save))
        with self._told(saves), saves.new_save(self.iteration, trainers) as folder:
            for name, trainer in trainers.items():
                trainer.save(str((folder / name).resolve()))
            write_state(folder, self._contents(loader, kl))
        if self.best is not None:
            saves.point_at_best(self.best.iteration)
        saves.remove_old(self.plan.run.keep_last, self.best.iteration if self.best else None)
        return saves.path_of(self.iteration)

    def _contents(self, loader: RowLoader, kl: KLController) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "written": time.time(),
            "data": loader.state(),
            "kl_controller": kl.state(),
            "reference": asdict(self.start.reference) if self.start.reference else None,
            "plan": asdict(self.plan),
            "best": asdict(self.best) if self.best else None,
            "versions": {name: version(name) for name in _VERSIONS_OF},
        }

    @contextmanager
    def _told(self, saves: SaveFolder) -> Iterator[None]:
        """Says of a save that failed: why, where, and how much space there was."""
        free = free_bytes(saves.root)
        try:
            yield
        except (OSError, RuntimeError) as error:
            cause = _cause(error, saves.root, save_bytes(self.plan), free)
            raise RuntimeError(f"iteration {self.iteration} could not be saved: {cause}") from error

    def resume(self, trainers: Mapping[str, TrainGroup], loader: RowLoader, kl: KLController) -> None:
        """Continues from the save of `start`; without one there is nothing to do."""
        self.best = remembered_best(self.start.contents, self.plan.eval)
        if self.plan.run.save:
            saves = SaveFolder(Path(self.plan.run.save))
            if self.best is not None and not saves.path_of(self.best.iteration).exists():
                # Removed, or in the folder of another run: it would stand in the way of the best of those that are here.
                self.best = None
            saves.point_at_best(self.best.iteration if self.best else None)
        if self.start.save is None:
            return
        for name, trainer in trainers.items():
            trainer.load(str((self.start.save / name).resolve()))
        loader.load_state(self.start.contents["data"])
        kl.load_state(self.start.contents["kl_controller"])
        self.iteration = self.start.iteration


def save_bytes(plan: Plan) -> int:
    """About what one save takes: weights, and per trained weight the optimizer's two moments (and its float32 copy of the weight)."""
    config = read_config(plan.train.hf_path)
    critic = 0 if plan.critic is None else _network_bytes(plan.critic, with_value_head(config), _parts(plan.critic))
    vision = 0 if plan.vision is None else _network_bytes(plan.vision, config, VISION_PARTS)
    return _network_bytes(plan.train, config, _parts(plan.train)) + critic + vision


def _parts(train: TrainPlan) -> tuple[Part, ...]:
    return PARTS if train.with_vision else ("text",)


def _network_bytes(train: TrainPlan, config: Mapping[str, Any], parts: tuple[Part, ...]) -> int:
    width = {"float32": 4, "bfloat16": 2}[train.dtype]
    optimizer = 8 if train.dtype == "float32" and not train.optimizer.use_distributed_optimizer else 12
    frozen = {"vision": train.freeze_vision, "projector": train.freeze_projector, "text": False}
    held = [entry for entry in entries(config) if entry.part in parts]
    return sum(math.prod(entry.mm_shape) * (width + (0 if frozen[entry.part] else optimizer)) for entry in held)


def free_bytes(folder: Path) -> int:
    """In the file system that holds `folder`, which need not be there yet."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def size_text(number: int) -> str:
    """Example: size_text(3 << 29) == "1.5 GiB"."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number / 1024:.0f} KiB"


def _cause(error: BaseException, root: Path, needed: int, free: int) -> str:
    text = " ".join(str(error).split())
    # A worker's reason arrives as text; torch's writer names none at all when the disk is full.
    if free < needed or any(os.strerror(number) in text for number in _NO_SPACE):
        return f"no space left in {root}, a save takes about {size_text(needed)} and {size_text(free)} were free; make room there"
    if os.strerror(errno.EROFS) in text:
        return f"{root} is on a read-only file system; make it writable"
    return f"{text} (writing into {root})"
