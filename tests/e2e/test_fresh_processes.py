"""What only a process of its own can show: the first imports, and the scripts that a user calls."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_mm_rl.platforms import device
from tests.data_files import SCRIPTS

CHECKOUT = Path(__file__).parents[2]
META = """
import mindspeed_mm_rl, torch
from mindspeed_mm_rl.platforms import cpu
cpu.adapt_megatron()
with torch.device("meta"):
    print({torch.arange(2.0).device.type, torch.empty(2).device.type, torch.zeros(2).device.type, torch.full((2,), 1.0).device.type})
"""


@pytest.mark.skipif(device.kind() != "cpu", reason="the shim is for CPU")
def test_meta_device_survives_the_shim():
    """from_pretrained builds on meta: where that is broken, rotary buffers stay uninitialised without an error."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", META], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{'meta'}"


def test_importing_the_package_loads_no_heavy_module_and_makes_torchvision_importable():
    code = (
        "import sys, mindspeed_mm_rl; assert not {'torch', 'transformers', 'ray', 'vllm'} & set(sys.modules);"
        "import torchvision.transforms.v2"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CHECKOUT, timeout=120)


@pytest.mark.parametrize(
    ("name", "sentence"), [("mth_17k", "choose one of: deepscaler math_17k orca_rlhf"), ("math_17k", "dapo-math-17k.parquet")]
)
def test_preparing_data_that_is_not_there_ends_in_one_line(tmp_path, name, sentence):
    script = subprocess.run(["bash", SCRIPTS / "preprocess_data.sh", name], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert script.returncode == 2
    assert sentence in script.stderr and script.stderr.startswith("error: ") and script.stderr.count("\n") == 1
