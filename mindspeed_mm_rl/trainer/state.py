"""Saves and resumes: one folder per iteration, whole or not there at all, and a text file that names the one to use.

save/latest_checkpointed_iteration.txt      an iteration; editing it picks another save
save/iter_0000050/actor/                    weights, optimizer, schedule, random state (torch_dist)
save/iter_0000050/state.json                everything else that a resumed run needs
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mindspeed_mm_rl.algorithms.kl import KLController
from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.data.loader import PromptLoader
from mindspeed_mm_rl.workers.group import ActorGroup

TRACKER = "latest_checkpointed_iteration.txt"
_VERSIONS_OF = ("torch", "megatron-core", "ray", "transformers")
_FOLDER_MODE, _FILE_MODE = 0o750, 0o640


@dataclass
class RunState:
    plan: Plan
    iteration: int = 0
    """Iterations that are finished."""

    def save(self, actor: ActorGroup, loader: PromptLoader, kl: KLController) -> Path:
        """Writes under a temporary name, syncs, renames, and only then points the text file at it; returns the folder."""
        root = Path(self.plan.run.save)
        final, temporary = root / f"iter_{self.iteration:07d}", root / f".iter_{self.iteration:07d}.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "actor").mkdir(parents=True, mode=_FOLDER_MODE)
        actor.save(str((temporary / "actor").resolve()))
        (temporary / "state.json").write_text(json.dumps(self._contents(loader, kl), indent=1), encoding="utf-8")
        _make_durable(temporary)
        replaced = root / f".iter_{self.iteration:07d}.replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        _write_tracker(root, self.iteration)
        shutil.rmtree(replaced, ignore_errors=True)
        self._remove_old(root)
        return final

    def _contents(self, loader: PromptLoader, kl: KLController) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "data": loader.state(),
            "kl_controller": kl.state(),
            "reference_load": self.plan.train.reference_load,
            "plan": asdict(self.plan),
            "versions": {name: version(name) for name in _VERSIONS_OF},
        }

    def _remove_old(self, root: Path) -> None:
        # By age: a run that went on from an earlier iteration must not count an abandoned later one as newer.
        saves = sorted(
            (save for save in root.glob("iter_*") if (save / "state.json").is_file()),
            key=lambda save: (save / "state.json").stat().st_mtime_ns,
        )
        for old in saves[: -self.plan.run.keep_last] if self.plan.run.keep_last else []:
            shutil.rmtree(old)

    def resume(self, folder: Path, actor: ActorGroup, loader: PromptLoader, kl: KLController) -> None:
        """Continues from a save. Raises ValueError when the folder is no whole save."""
        contents = read_state(folder)
        actor.load(str((folder / "actor").resolve()))
        if self.plan.train.finetune:
            return
        loader.load_state(contents["data"])
        kl.load_state(contents["kl_controller"])
        self.iteration = int(contents["iteration"])


def read_state(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{folder} is no whole training save: state.json cannot be read ({error}); pick another iteration in {TRACKER}"
        ) from error


def _make_durable(folder: Path) -> None:
    """fsync of every file and folder, files 640 and folders 750."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(_FOLDER_MODE if path.is_dir() else _FILE_MODE)
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_tracker(root: Path, iteration: int) -> None:
    temporary = root / f".{TRACKER}.partial"
    temporary.write_text(f"{iteration}\n", encoding="utf-8")
    temporary.chmod(_FILE_MODE)
    _sync(temporary)
    temporary.rename(root / TRACKER)
    _sync(root)
