"""Every layout and every family of models: log-probs, losses, gradient norms and weights of three updates are those of one process."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from tests.layout_bench import LayoutBench
from tests.layout_modes import cells

REFUSED_BY_0_12 = {("Qwen2.5", "PP2+VPP2xDP2+dist.opt.+overlap"): "an embedding that the first and the last pipeline stage both have"}
"""Where sizes of the tiny model don't end at a multiple of 128 numbers."""


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LayoutBench]:
    bench = LayoutBench(tmp_path_factory.mktemp("layouts"))
    yield bench
    bench.close()
    version = metadata.version("megatron-core")
    table, file = bench.table(version), Path(__file__).parents[2] / f"logs/parallel_matrix_megatron_core_{version}.txt"
    file.parent.mkdir(exist_ok=True)
    file.write_text(table)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{table}also in {file}")


@pytest.mark.parametrize(("model", "mode"), cells(), ids=[f"{model}: {mode}" for model, mode in cells()])
def test_a_layout_changes_nothing(bench: LayoutBench, model: str, mode: str) -> None:
    reason = REFUSED_BY_0_12.get((model, mode)) if metadata.version("megatron-core").startswith("0.12") else None
    if reason is None:
        bench.run(model, mode).check()
        return
    with pytest.raises(RuntimeError, match=f"ValueError: .*{reason}"):
        bench.run(model, mode)
    bench.found[model, mode] = "refused"
