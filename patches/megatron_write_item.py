"""megatron 0.12 saves through a private function of torch, which has gained an argument without a default since."""

from __future__ import annotations

from mindspeed_mm_rl.platforms import versions
from mindspeed_mm_rl.platforms.patching import Patch


def _apply() -> None:
    import functools

    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from torch.distributed.checkpoint.filesystem import SerializationFormat

    filesystem_async._write_item = functools.partial(filesystem_async._write_item, serialization_format=SerializationFormat.TORCH_SAVE)


PATCH = Patch(
    package="megatron-core",
    versions=">=0.12,<0.13",
    process="train",
    changes=("megatron.core.dist_checkpointing.strategies.filesystem_async._write_item",),
    until="megatron-core 0.12 is no longer supported",
    condition="torch's _write_item asks for a serialization format",
    holds=lambda: "serialization_format" in versions.source("torch", "torch/distributed/checkpoint/filesystem.py"),
    apply=_apply,
)
