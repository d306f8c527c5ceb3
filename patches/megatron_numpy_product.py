"""megatron's checkpoints call numpy.product, which numpy 2 no longer has."""

from __future__ import annotations

from mindspeed_mm_rl.platforms import versions
from mindspeed_mm_rl.platforms.patching import Patch


def _apply() -> None:
    import numpy

    vars(numpy).setdefault("product", numpy.prod)


PATCH = Patch(
    package="megatron-core",
    versions="<0.16",
    process="train",
    changes=("numpy.product",),
    until="megatron-core older than 0.16 is no longer supported",
    condition="numpy is 2 or newer",
    holds=lambda: versions.within(versions.installed("numpy") or "", ">=2"),
    apply=_apply,
)
