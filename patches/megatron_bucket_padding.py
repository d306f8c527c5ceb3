"""megatron's distributed optimizer collects state for a save without the padding of buckets, but cuts it at places that count it: behind
a padded bucket every parameter is saved with numbers of its neighbour, main weights and moments alike."""

from __future__ import annotations

from typing import Any

from mindspeed_mm_rl.platforms.patching import Patch


def _apply() -> None:
    import functools

    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    state_of = DistributedOptimizer.sharded_param_state_fully_reshardable

    @functools.wraps(state_of)
    def with_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        sizes = [(buffer, buffer.numel) for buffer in self.buffers]
        sizes += [(bucket, bucket.grad_data.numel()) for buffer in self.buffers for bucket in buffer.buckets]
        unpadded = [part.numel_unpadded for part, _ in sizes]
        try:
            for part, size in sizes:
                part.numel_unpadded = size
            return state_of(self, *args, **kwargs)
        finally:
            for (part, _), size in zip(sizes, unpadded, strict=True):
                part.numel_unpadded = size

    DistributedOptimizer.sharded_param_state_fully_reshardable = with_padding


PATCH = Patch(
    package="megatron-core",
    versions=">=0.15",
    process="train",
    changes=("megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.sharded_param_state_fully_reshardable",),
    until="megatron no longer warns of a range that exceeds the unpadded buffer",
    apply=_apply,
)
