"""The networks of a recipe on the meta device, a rank of each kind, in a world of as many ranks that talk to nobody.

Runs in a process of its own: megatron's adaptation and the world are process-wide.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._device import _device_constructors

from mindspeed_mm_rl.config.plan import TrainPlan
from mindspeed_mm_rl.models.families import read_architecture
from mindspeed_mm_rl.models.names import with_value_head
from mindspeed_mm_rl.models.rank_pieces import GridPlace
from mindspeed_mm_rl.platforms import device
from tests.recipes import recipe_plan

Shapes = dict[str, tuple[int, ...]]
NetworksOfPlaces = list[tuple[GridPlace, list[Shapes]]]
"""For one rank of each pipeline stage: its place, and names and shapes of its networks' weights by virtual stage."""


class OnMeta(TorchFunctionMode):
    """Tensors without memory, also where the code names a device."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        where = {"device": "meta"} if function in _device_constructors() else {}
        return function(*args, **(kwargs or {}) | where)


@contextlib.contextmanager
def rank_of(plan: TrainPlan, rank: int, world_size: int) -> Iterator[None]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from mindspeed_mm_rl.engines.megatron import process_groups

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    parallel_state.initialize_model_parallel(**process_groups.group_sizes(plan), create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        process_groups.destroy()


def built_networks(recipe: str, critic: bool) -> NetworksOfPlaces:
    """By the engine's own construction and loading; ranks of one stage differ by symmetry alone."""
    device.adapt_megatron()
    from mindspeed_mm_rl.engines.megatron import process_groups
    from mindspeed_mm_rl.engines.megatron.network import new_networks
    from mindspeed_mm_rl.models.qwen2_5_vl import Policy
    from mindspeed_mm_rl.models.value import ValueModel

    plan = recipe_plan(recipe)
    train, devices = plan.critic if critic else plan.train, plan.run.num_devices
    architecture = read_architecture(train.hf_path)
    config = with_value_head(architecture.raw) if critic else architecture.raw
    found = []
    for stage in range(train.pipeline_parallel_size):
        with rank_of(train, stage * (devices // train.pipeline_parallel_size), devices), OnMeta():
            networks = new_networks(ValueModel if critic else Policy, architecture, train, config, _meta_pieces)
            weights = [network.weights() for network in networks]
            assert all(weight.is_meta for part in weights for weight in part.values())
            found.append((process_groups.grid_place(), [{name: tuple(w.shape) for name, w in part.items()} for part in weights]))
    return found


def _meta_pieces(pieces: Any) -> dict[str, torch.Tensor]:
    return {piece.name: torch.empty(piece.entry.mm_shape, device="meta") for piece in pieces}
