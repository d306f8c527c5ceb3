"""The published torchvision is linked against CUDA: beside a CPU build of torch its binary does not load, and its import dies because two
operators are not declared. Declared where the binary does not load, when torchvision is imported; nothing here calls them."""

from __future__ import annotations

from mindspeed_mm_rl.platforms import versions
from mindspeed_mm_rl.platforms.patching import Patch


def _apply() -> None:
    """The one patch at import: mindspeed_mm_rl/__init__.py puts a finder before those of Python."""
    import mindspeed_mm_rl  # noqa: F401


PATCH = Patch(
    package="torchvision",
    versions=">=0.20",
    process="every",
    changes=("torchvision::nms", "torchvision::qnms"),
    until="the index of torch's CPU wheels has torchvision's too, or its import needs no declarations",
    condition="torch is built for cpu",
    holds=lambda: versions.torch_build() == "cpu",
    apply=_apply,
)
