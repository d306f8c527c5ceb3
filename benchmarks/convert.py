"""How fast are hf_to_mm and mm_to_hf beside a plain copy of the same bytes, and how much memory do they take?

A random bf16 model of Qwen2.5-1.5B's shape (3.09 GB) is copied and converted in turn, several rounds in one process, everything fsynced.
Peak memory is anonymous memory (RssAnon): pages of files that are mapped are the page cache's.

Example:
    python benchmarks/convert.py --folder /tmp/convert --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from checkpoint.convert import hf_to_mm, mm_to_hf
from checkpoint.options import HfConfig, HfToMmOptions, MmToHfOptions
from checkpoint.safetensors_writer import write_safetensors
from checkpoint.tensor_files import Pending
from mindspeed_mm_rl.models.names import entries

QWEN25_1_5B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
_COPY_BYTES = 1 << 24
_SAMPLE_SECONDS = 0.01


def make_model(folder: Path) -> Path:
    """Written once; sharded as Hugging Face shards."""
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        shapes = dict(pair for entry in entries(QWEN25_1_5B) for pair in zip(entry.hf, entry.hf_shapes, strict=True))
        write_safetensors(folder, [Pending(name, shape, torch.bfloat16, lambda s=shape: [random(s)]) for name, shape in shapes.items()])
        (folder / "config.json").write_text(json.dumps(QWEN25_1_5B))
    return folder


def random(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)


def copy(source: Path, target: Path) -> None:
    """The *.safetensors of a folder, byte by byte, each fsynced."""
    target.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb") as reader, (target / path.name).open("wb") as writer:
            shutil.copyfileobj(reader, writer, _COPY_BYTES)
            writer.flush()
            os.fsync(writer.fileno())


class Peak:
    """Highest RssAnon of this process while it is watched, in bytes."""

    def __init__(self) -> None:
        self.bytes = 0
        self._done = threading.Event()

    @contextmanager
    def watched(self) -> Iterator[None]:
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.bytes = max(self.bytes, int(fields["RssAnon"].split()[0]) * 1024)


def timed(work: Callable[[], None]) -> tuple[float, int]:
    """(seconds, peak bytes)"""
    # What an earlier step still has to write would be paid by this one.
    os.sync()
    peak, start = Peak(), time.perf_counter()
    with peak.watched():
        work()
    return time.perf_counter() - start, peak.bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="about 10 GB are written below it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="tensors written at a time")
    arguments = parser.parse_args()
    source = make_model(arguments.folder / "hf")
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    copied, ranks, back = (arguments.folder / name for name in ("copied", "ranks", "back"))
    config = HfConfig(str(source))
    ways: dict[str, Callable[[], None]] = {
        "copy": lambda: copy(source, copied),
        "hf_to_mm": lambda: hf_to_mm(HfToMmOptions(mm_dir=str(ranks), hf_config=config, workers=arguments.workers)),
        "mm_to_hf": lambda: mm_to_hf(MmToHfOptions(save_hf_dir=str(back), mm_dir=str(ranks), hf_config=config, workers=arguments.workers)),
    }
    measured: dict[str, list[tuple[float, int]]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for folder in (copied, ranks, back):
            shutil.rmtree(folder, ignore_errors=True)
        for name, work in ways.items():
            measured[name].append(timed(work))
    show(measured, size)


def show(measured: dict[str, list[tuple[float, int]]], size: int) -> None:
    """Medians of the rounds; the ratio is the copy's time over the way's."""
    table = Table(title=f"{size / 1e9:.2f} GB, median of {len(measured['copy'])} rounds")
    for title in ("", "seconds", "all rounds", "GB/s", "speed / copy", "peak RssAnon, MB"):
        table.add_column(title, justify="right" if title else "left")
    copy_seconds = statistics.median(seconds for seconds, _ in measured["copy"])
    for name, rounds in measured.items():
        seconds = statistics.median(seconds for seconds, _ in rounds)
        every = " ".join(f"{value:.2f}" for value, _ in rounds)
        peak = max(peak for _, peak in rounds) / 1e6
        table.add_row(name, f"{seconds:.2f}", every, f"{size / 1e9 / seconds:.2f}", f"{copy_seconds / seconds:.2f}", f"{peak:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
