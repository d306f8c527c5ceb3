"""Console scripts and packages. Dependencies are in requirements/: they differ between CPU, CUDA and NPU machines."""

from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

HERE = Path(__file__).parent

setup(
    name="mindspeed-mm-rl",
    version="0.1.0",
    description="RL post-training for language and vision-language models on Ray, megatron-core and vLLM",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["mindspeed_mm_rl", "mindspeed_mm_rl.*", "checkpoint", "checkpoint.*"]),
        # Files that are loaded by their place, beside the package.
        *find_namespace_packages(include=["patches", "patches.*"]),
    ],
    entry_points={
        "console_scripts": [
            "mm-rl = mindspeed_mm_rl.cli.main:main",
            "mm-convert = checkpoint.convert_cli:main",
        ]
    },
)
