"""Fixtures every test may use: the data folder and one tiny random checkpoint of each family."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

# Before any test imports transformers: it makes torchvision importable beside a CPU build of torch.
import mindspeed_mm_rl  # noqa: F401
from mindspeed_mm_rl.platforms import env

_OF_THE_SHELL = (
    "DEFAULT_YAML", "NNODES", "NPUS_PER_NODE", "MASTER_ADDR", "NODE_RANK", "CURRENT_IP", "SOCKET_IFNAME", "RAY_PORT", "RAY_ADDRESS",
    "WAIT_SECONDS", "MAX_RESTARTS", "COLUMNS",
)  # fmt: skip
_LONGEST_FOLDER_OF_SOCKETS = 39


def pytest_configure() -> None:
    """What the shell around has set for runs of its own is not for the tests."""
    for name in (*_OF_THE_SHELL, *env.ALLOCATORS):
        env.remove(name)
    os.umask(0o022)
    if len(tempfile.gettempdir()) > _LONGEST_FOLDER_OF_SOCKETS:
        os.environ["TMPDIR"] = tempfile.tempdir = "/tmp"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data", default="data", help="folder with real data sets and tokenizers; tests that need them are skipped without")
    parser.addoption("--sources", default="sources", help="folder with packages for an NPU, read and never imported; skipped without")


@pytest.fixture(scope="session")
def data_dir(request: pytest.FixtureRequest) -> Path:
    folder = Path(request.config.getoption("--data")).expanduser()
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}: pass --data DIR")
    return folder


@pytest.fixture(scope="session")
def tiny_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Qwen2.5-VL with its own lm_head."""
    from tests.tiny import make_tiny_vl

    return make_tiny_vl(tmp_path_factory.mktemp("tiny_vl"))


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Qwen2 (text only) with tied embeddings."""
    from tests.tiny import make_tiny_text

    return make_tiny_text(tmp_path_factory.mktemp("tiny_text"), tied=True)


@pytest.fixture(scope="session")
def one_rank() -> Iterator[None]:
    """megatron-core adapted to this device, in a world of one process. It changes torch process-wide: no vLLM in the same process."""
    from mindspeed_mm_rl.platforms import device

    device.adapt_megatron()
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.set_num_threads(1)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(device.collective_backend(), store=torch.distributed.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
    yield


@pytest.fixture(scope="module")
def recipe_builder() -> Iterator[ProcessPoolExecutor]:
    """A process whose world may be as large as a recipe's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool
