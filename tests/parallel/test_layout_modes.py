"""Each layout once: log-probs, losses, gradient norms and weights of three updates are those of one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.layout_bench import LayoutBench
from tests.layout_modes import MODES

MODEL_OF_MODE = {
    "TP2": "Qwen2.5",
    "TP2+SP": "Qwen2.5-VL, ViT trained",
    "PP2": "Qwen2.5",
    "PP2 of 3+1 layers": "DeepSeek-V3",
    "PP2+VPP2": "Qwen2.5",
    "CP2 ulysses": "Qwen2.5-VL, ViT trained",
    "CP2 all_gather": "DeepSeek-V3",
    "TP2xCP2 ulysses": "Qwen3",
    "TP2+SPxCP2 all_gather": "Qwen2.5-VL",
    "DP2": "Qwen3",
    "DP2+dist.opt.+overlap": "Qwen2.5-VL, ViT trained",
    "TP2xDP2+dist.opt.": "Qwen2.5, critic",
    "TP2xPP2": "Qwen2.5-VL",
    "PP2xDP2+dist.opt.+overlap": "Qwen2.5, critic",
    "PP2+VPP2xDP2+dist.opt.+overlap": "Qwen2.5-VL, ViT trained",
    "EP2": "DeepSeek-V3",
    "EP2xDP2+dist.opt.+overlap": "Qwen3-MoE",
    "TP2xEP2": "Qwen3-MoE",
    "TP2xEP2, ETP2": "Qwen3-MoE",
    "PP2xEP2": "DeepSeek-V3",
    "CP2xEP2": "Qwen3-MoE",
}
"""Those that a layout is hardest for; tests/matrix has all of them."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LayoutBench]:
    bench = LayoutBench(tmp_path_factory.mktemp("layouts"))
    yield bench
    bench.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_layout_changes_nothing(bench: LayoutBench, mode: str) -> None:
    bench.run(MODEL_OF_MODE[mode], mode).check()
