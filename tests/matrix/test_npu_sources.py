"""What can't be run without an NPU fits the packages that it is written for: names, functions and arguments, without running them.

    pytest tests/matrix/test_npu_sources.py --sources DIR

DIR has the packages as site-packages would: torch_npu (an unpacked wheel), mindspeed, vllm_ascend.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import mindspeed_mm_rl
from tests.npu_sources import PACKAGES, Use, declared_options, optional, options, problem, uses

OURS = Path(mindspeed_mm_rl.__file__).parent
FUSED = {"npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul", "npu_swiglu", "npu_grouped_matmul"}


@pytest.fixture(scope="module")
def sources(request: pytest.FixtureRequest) -> Path:
    folder = Path(request.config.getoption("--sources")).expanduser()
    missing = [package for package in PACKAGES if not (folder / package).is_dir()]
    if missing:
        pytest.skip(f"no {', '.join(missing)} in {folder}: pass --sources DIR")
    return folder


def test_the_uses_are_found():
    """The check itself would pass if it saw nothing."""
    found = uses(OURS)
    assert {use.name for use in found if use.module == "torch_npu"} >= FUSED
    assert {(use.module, use.name) for use in found} >= {
        ("mindspeed.megatron_adaptor", ""),
        ("mindspeed.megatron_adaptor", "get_mindspeed_args"),
        ("torch_npu.npu", "max_memory_allocated"),
        ("torch_npu.contrib.transfer_to_npu", ""),
        ("torch_npu.profiler", "ProfilerActivity"),
    }
    assert any(use.name == "profile" and "with_modules" in use.keywords for use in found if use.module == "torch_npu.profiler")
    (swiglu,) = (use for use in found if use.name == "npu_swiglu")
    assert (swiglu.positional, swiglu.keywords) == (1, ("dim",))


def test_everything_that_is_used_is_there(sources: Path):
    problems = [problem(use, sources, optional(OURS)) for use in uses(OURS)]
    assert not [found for found in problems if found is not None]


def test_arguments_for_mindspeed_are_its_own(sources: Path):
    assert options(OURS) == {"--optimization-level"}
    assert options(OURS) <= declared_options(sources / "mindspeed")


@pytest.mark.parametrize(
    "use",
    [
        Use("x.py:1", "torch_npu", "npu_swigloo"),
        Use("x.py:1", "torch_npu", "npu_swiglu", 1, ("axis",)),
        Use("x.py:1", "torch_npu", "npu_rms_norm", 1),
        Use("x.py:1", "torch_npu", "npu_rms_norm", 4),
        Use("x.py:1", "torch_npu.npu", "max_memory"),
        Use("x.py:1", "torch_npu.profiler", "profile", 0, ("memory",)),
        Use("x.py:1", "mindspeed.adaptor", ""),
        Use("x.py:1", "mindspeed.megatron_adaptor", "repatch", 0),
        Use("x.py:1", "mindspeed.megatron_adaptor", "repatch", 1, ("force",)),
    ],
)
def test_what_is_not_there_is_found(sources: Path, use: Use):
    assert problem(use, sources) is not None
