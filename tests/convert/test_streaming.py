"""Files are written tensor by tensor: little memory, no matter how large the model, and what torch's and Python's own readers accept."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from checkpoint.safetensors_writer import write_safetensors
from checkpoint.tensor_files import Pending, write_file
from checkpoint.torch_writer import TorchFile
from checkpoint.work import Work
from mindspeed_mm_rl.models.names import entries
from tests.checkpoints import pending
from tests.convert.families import same

ROOT = Path(__file__).resolve().parents[2]
LARGE = {
    "model_type": "qwen2",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 16384,
    "tie_word_embeddings": True,
}
"""330 MB in bfloat16, 32 MB of them the embedding."""


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randn(2, 3, 4).half(),
        "d": torch.arange(6),
        "e": torch.randn(0, 4),
    }


@pytest.mark.parametrize("workers", [0, 4])
def test_a_file_is_one_of_torch(workers: int, tmp_path: Path) -> None:
    models = {"model0": pending(tensors()), "model1": [], "model2": pending({"x": torch.ones(5)})}
    file = TorchFile(tmp_path / "model_optim_rng.pt", models, {"checkpoint_version": 3.0})
    Work("test", workers).write([file]) if workers else write_file(file)
    for mapped in (False, True):
        content = torch.load(file.path, weights_only=True, mmap=mapped)
        assert list(content) == ["model0", "model1", "model2", "checkpoint_version"] and content["checkpoint_version"] == 3.0
        assert same(content["model0"], tensors())
        assert content["model1"] == {} and torch.equal(content["model2"]["x"], torch.ones(5))
    assert zipfile.ZipFile(file.path).testzip() is None


def test_a_tensor_in_parts_is_one_tensor(tmp_path: Path) -> None:
    rows = torch.arange(12.0).view(6, 2)
    file = TorchFile(
        tmp_path / "model_optim_rng.pt", {"model": [Pending("x", (6, 2), torch.float32, lambda: (rows[:1], rows[1:4], rows[4:]))]}, {}
    )
    write_file(file)
    assert torch.equal(torch.load(file.path, weights_only=True)["model"]["x"], rows)
    assert zipfile.ZipFile(file.path).testzip() is None


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(json.dumps(LARGE))
    weights = [(name, shape) for entry in entries(LARGE) for name, shape in zip(entry.hf, entry.hf_shapes, strict=True)]
    write_safetensors(
        folder, [Pending(name, shape, torch.bfloat16, lambda shape=shape: [torch.randn(shape).bfloat16()]) for name, shape in weights]
    )
    return folder


PROGRAM = """
import sys, threading, torch
from pathlib import Path
from checkpoint.convert_cli import main

def anonymous():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) // 1024

torch.set_num_threads(1)
start, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
threading.Thread(target=watch, daemon=True).start()
status = main(sys.argv[1:])
done.set()
print("grown by", peak[0] - start)
sys.exit(status)
"""


def growth(*arguments: str) -> int:
    """By how many megabytes a process that converts grew at most; pages of files are not counted."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    return int(done.stdout.rsplit("grown by ", 1)[1])


def test_memory_does_not_grow_with_the_model(large: Path, tmp_path: Path) -> None:
    size = (large / "model.safetensors").stat().st_size
    source = f"--cfg.hf_config.hf_dir={large}"
    split = ["--cfg.parallel_config.tp_size=2", "--cfg.parallel_config.llm_pp_layers=[4,6]"]
    runs = {
        "hf_to_mm": (["hf_to_mm", source, f"--cfg.mm_dir={tmp_path / 'one'}"], 32),
        "mm_to_hf": (["mm_to_hf", source, f"--cfg.mm_dir={tmp_path / 'one'}", f"--cfg.save_hf_dir={tmp_path / 'hf'}"], 32),
        # A weight of several ranks is put together: for each of two workers the largest (32 MB), twice. About 100 are seen.
        "hf_to_mm tp2": (["hf_to_mm", source, f"--cfg.mm_dir={tmp_path / 'two'}", *split], 128),
        "mm_to_hf tp2": (["mm_to_hf", source, f"--cfg.mm_dir={tmp_path / 'two'}", f"--cfg.save_hf_dir={tmp_path / 'hf2'}"], 128),
    }
    assert size > 300 << 20
    for name, (arguments, bound) in runs.items():
        assert growth(*arguments) < bound, name
