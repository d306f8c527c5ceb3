"""Nothing that comes from elsewhere is run: saves, weights, YAML, model folders. What the program writes is not for everyone to read."""

from __future__ import annotations

import ast
import builtins
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import FileSystemReader

from mindspeed_mm_rl.models.saved_weights import refuse_code
from tests.data_files import SCRIPTS, png
from tests.plans import train_plan

REPOSITORY = Path(__file__).parents[2]


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def make_save(folder: Path, **objects: object) -> Path:
    """A torch_dist folder as megatron's: tensors and objects in shards, the common part beside them."""
    distributed_checkpoint.save({"model.text_decoder.w": torch.ones(3), **objects}, checkpoint_id=folder)
    torch.save({"rng": {"seed": 7}, "optimizer": {"betas": (0.9, 0.95)}}, folder / "common.pt")
    return folder


def plant_in_metadata(folder: Path, evil: Evil) -> None:
    metadata = FileSystemReader(folder).read_metadata()
    metadata.planner_data = evil
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def plant_in_common(folder: Path, evil: Evil) -> None:
    torch.save({"rng": evil}, folder / "common.pt")


def plant_in_a_shard(folder: Path, evil: Evil) -> None:
    make_save(folder, extra_state=evil)


def run_metadata(folder: Path) -> None:
    FileSystemReader(folder).read_metadata()


def run_common(folder: Path) -> None:
    torch.load(folder / "common.pt", weights_only=False)


def run_shard(folder: Path) -> None:
    distributed_checkpoint.load({"extra_state": None}, checkpoint_id=folder)


@pytest.mark.parametrize(
    ("plant", "run", "file"),
    [
        (plant_in_metadata, run_metadata, ".metadata"),
        (plant_in_common, run_common, "common.pt"),
        (plant_in_a_shard, run_shard, ".distcp"),
    ],
)
def test_code_in_a_save_is_refused_and_not_run(tmp_path, plant, run, file):
    folder, made = make_save(tmp_path / "actor"), tmp_path / "made"
    refuse_code(folder)
    plant(folder, Evil(made))
    with pytest.raises(ValueError, match=rf"{tmp_path}/actor/\S*{file}"):
        refuse_code(folder)
    assert not made.exists()
    # What was planted is alive: the readers of torch and megatron would have run it.
    run(folder)
    assert made.is_dir()


def test_a_save_that_points_elsewhere_is_refused(tmp_path):
    folder = make_save(tmp_path / "actor", extra_state={"seed": 7})
    metadata = FileSystemReader(folder).read_metadata()
    for place in metadata.storage_data.values():
        place.relative_path = "../elsewhere.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"points outside of its folder .\.\./elsewhere"):
        refuse_code(folder)


@pytest.mark.parametrize("plant", [plant_in_metadata, plant_in_common])
def test_the_train_engine_refuses_it_before_megatron_looks(tiny_vl, one_rank, tmp_path, plant):
    from mindspeed_mm_rl.engines.megatron.engine import MegatronTrainEngine

    engine = MegatronTrainEngine(train_plan(tiny_vl, no_load_optim=True), with_reference=False, entropy_bonus=False, publish_vision=True)
    engine.save(tmp_path)
    engine.load(tmp_path)
    plant(tmp_path, Evil(tmp_path / "made"))
    with pytest.raises(ValueError, match=r"is not the metadata of a training save|nothing of it was run"):
        engine.load(tmp_path)
    assert not (tmp_path / "made").exists()


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def option(call: ast.Call, name: str) -> object:
    return next((ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == name), None)


RUNS_CODE = re.compile(r"^(pickle|dill|cloudpickle)\.loads?$|^yaml\.(load|unsafe_load|full_load)$|^os\.(system|popen)$|^(eval|exec)$")


def test_no_call_runs_what_it_reads():
    """Every file that ships, tests aside: they plant what must not be run."""
    wrong = []
    for path in (
        path for folder in ("mindspeed_mm_rl", "checkpoint", "examples", "benchmarks") for path in (REPOSITORY / folder).rglob("*.py")
    ):
        for name, call in calls(ast.parse(path.read_text())):
            unsafe = name == "torch.load" and option(call, "weights_only") != "True"
            unsafe |= name.endswith("from_pretrained") and option(call, "trust_remote_code") == "True"
            unsafe |= option(call, "shell") == "True" or bool(RUNS_CODE.match(name))
            if unsafe:
                wrong.append(f"{path.relative_to(REPOSITORY)}:{call.lineno} {name}")
    assert not wrong


def test_code_in_a_model_folder_is_run_only_on_request():
    from mindspeed_mm_rl.config.schema import GenerateConfig

    assert GenerateConfig().trust_remote_code is False
    given = [
        line
        for path in (REPOSITORY / "examples/rl/configs").glob("*.yaml")
        for line in path.read_text().splitlines()
        if "trust_remote" in line
    ]
    assert all(line.split(":")[1].split("#")[0].strip() == "false" for line in given)


RUN_THEN_WRITE = """
import contextlib, os
os.umask({umask})
from mindspeed_mm_rl.cli.main import app
with contextlib.suppress(SystemExit, Exception):
    app(["train", "--config", "none.yaml"], standalone_mode=False)
os.mkdir("folder")
open("file", "w").close()
"""


@pytest.mark.parametrize(("umask", "modes"), [(0o022, ["0o750", "0o640"]), (0o077, ["0o700", "0o600"])])
def test_new_files_are_for_the_owner_and_the_group(tmp_path, umask, modes):
    """The command sets it for itself and so for every process that it starts; a stricter one stays."""
    code = RUN_THEN_WRITE.format(umask=umask)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY)}, check=True, capture_output=True)
    assert [oct((tmp_path / name).stat().st_mode & 0o777) for name in ("folder", "file")] == modes


def test_rows_of_pictures_are_for_the_owner_and_the_group(tmp_path):
    source = tmp_path / "in" / "train.parquet"
    source.parent.mkdir()
    rows = [{"images": [{"bytes": png(28, 28), "path": None}], "problem": "<image>Find x.", "answer": "5"}]
    pq.write_table(pa.Table.from_pylist(rows), source)
    command = [sys.executable, SCRIPTS / "geo3k.py", "--local_data", source.parent, "--local_dir", tmp_path / "deep" / "out"]
    subprocess.run(command, check=True, capture_output=True, umask=0o022)
    written = [tmp_path / "deep", tmp_path / "deep" / "out", tmp_path / "deep" / "out" / "train.parquet"]
    assert [oct(path.stat().st_mode & 0o777) for path in written] == ["0o750", "0o750", "0o640"]


def test_builtins_are_out_of_reach_of_a_response():
    """mathruler hands what stands in the box to sympy, which evaluates Python."""
    from mindspeed_mm_rl.rewards.math import equal_by_mathruler

    dangerous = {"open", "exec", "eval", "getattr", "setattr", "input", "print", "compile", "breakpoint", "globals", "exit", "quit"}
    for name in sorted(dangerous & set(dir(builtins))):
        marker = Path(f"/tmp/never-{os.getpid()}-{name}")
        assert not equal_by_mathruler(f"{name}('{marker}','w')", "1")
        assert not marker.exists()
