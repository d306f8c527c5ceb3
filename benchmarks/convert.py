"""How fast are hf_to_mm and mm_to_hf beside a plain copy of the same bytes, and how much memory do they take?

A random bf16 model of Qwen2.5-1.5B's shape (3.09 GB) is copied and converted; mm_to_hf reads files of ranks that are made before the first
round. All three end alike: everything is fsynced, then the folder gets its name. Peak memory is anonymous memory (RssAnon) of the one
process: pages of files that are mapped are the page cache's.

The three write one after the other into one place, which is emptied before each, and six rounds take every order of them once: on a
virtual machine memory that the page cache hasn't had before comes slowly from the host, so that who always writes last looks slow.

Example:
    python benchmarks/convert.py --folder /tmp/convert --rounds 6
    python benchmarks/convert.py --folder /tmp/convert --rounds 6 --tensor 2 --cold
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from checkpoint.convert import hf_to_mm, mm_to_hf
from checkpoint.folders import new_folder
from checkpoint.options import HfConfig, HfToMmOptions, MmToHfOptions, ParallelConfig
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
    """The *.safetensors of a folder, byte by byte; temporary name, fsync and rename are the converter's."""
    with new_folder(target) as folder:
        for path in source.glob("*.safetensors"):
            shutil.copyfile(path, folder / path.name)


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


def forget(*folders: Path) -> None:
    """Drops what the page cache holds of their files."""
    for path in (file for folder in folders for file in folder.rglob("*") if file.is_file()):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="about 10 GB are written below it")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2, help="tensors written at a time")
    parser.add_argument("--tensor", type=int, default=1, help="tensor ranks")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline ranks")
    parser.add_argument("--cold", action="store_true", help="what is read lies on the disk, not in the page cache")
    arguments = parser.parse_args()
    source = make_model(arguments.folder / "hf")
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    ranks, target = arguments.folder / "ranks", arguments.folder / "out"
    config = HfConfig(str(source))
    stages = [QWEN25_1_5B["num_hidden_layers"] // arguments.pipeline] * arguments.pipeline
    layout = ParallelConfig(tp_size=arguments.tensor, llm_pp_layers=stages)
    to_mm = HfToMmOptions(mm_dir=str(target), hf_config=config, parallel_config=layout, workers=arguments.workers)
    to_hf = MmToHfOptions(save_hf_dir=str(target), mm_dir=str(ranks), hf_config=config, workers=arguments.workers)
    ways = {"copy": lambda: copy(source, target), "hf_to_mm": lambda: hf_to_mm(to_mm), "mm_to_hf": lambda: mm_to_hf(to_hf)}
    for folder in (ranks, target):
        shutil.rmtree(folder, ignore_errors=True)
        hf_to_mm(replace(to_mm, mm_dir=str(folder)))
    measured: dict[str, list[tuple[float, int]]] = {name: [] for name in ways}
    for order in itertools.islice(itertools.cycle(itertools.permutations(ways)), arguments.rounds):
        for name in order:
            if arguments.cold:
                forget(source, ranks)
            shutil.rmtree(target)
            measured[name].append(timed(ways[name]))
    show(measured, size)


def show(measured: dict[str, list[tuple[float, int]]], size: int) -> None:
    """The ratio is the copy's time over the way's: the median of those within one round, and that of the best of each."""
    table = Table(title=f"{size / 1e9:.2f} GB, {len(measured['copy'])} rounds")
    for title in ("", "seconds, median", "best", "all", "GB/s", "speed / copy, median", "best", "peak RssAnon, MB"):
        table.add_column(title, justify="right" if title else "left")
    copied = [seconds for seconds, _ in measured["copy"]]
    for name, rounds in measured.items():
        every = [seconds for seconds, _ in rounds]
        median, best = statistics.median(every), min(every)
        ratio = statistics.median(copy / way for copy, way in zip(copied, every, strict=True))
        peak = max(peak for _, peak in rounds) / 1e6
        numbers = (f"{median:.2f}", f"{best:.2f}", " ".join(f"{seconds:.2f}" for seconds in every), f"{size / 1e9 / median:.2f}")
        table.add_row(name, *numbers, f"{ratio:.2f}", f"{min(copied) / best:.2f}", f"{peak:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
