"""Weights, optimizer, schedule and random state to and from a torch_dist folder: every rank writes and reads its own shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm_rl.models.saved_weights import refuse_code
from mindspeed_mm_rl.platforms import device
from mindspeed_mm_rl.platforms.compat import megatron_is_0_12

_MODEL_PREFIX = "model."
_SETTINGS = ("max_lr", "min_lr", "betas", "eps")
"""What a parameter group has from the plan: a save must not bring back those of the run that wrote it."""


@dataclass(frozen=True)
class OptimizerForm:
    """What the form of an optimizer's state in a save depends on; all other sizes of a layout may change from save to save."""

    use_distributed_optimizer: bool
    has_expert_ranks: bool
    """expert_model_parallel_size > 1: experts then have an optimizer of their own."""

    def check(self, saved: dict[str, bool] | None, folder: Path) -> None:
        """Raises ValueError when the save's is another one. saved: None in a save that doesn't say."""
        keys = {"use_distributed_optimizer": "use_distributed_optimizer", "has_expert_ranks": "expert_model_parallel_size > 1"}
        for field, key in keys.items():
            own = getattr(self, field)
            if saved is not None and saved[field] != own:
                raise ValueError(
                    f"{folder} was saved with {key} {str(saved[field]).lower()}, this run has {str(own).lower()}: the optimizer's "
                    "state has another form; set it as in the save, or set no_load_optim: true to go on with a new optimizer"
                )


def save(folder: Path, networks: Sequence[Any], optimizer: Any, schedule: Any, form: OptimizerForm) -> None:
    """Collective. `folder` must exist and be empty. Raises OSError or RuntimeError when a rank cannot write its shards."""
    from megatron.core import dist_checkpointing

    # Before its first step Adam has no moments, which could not be loaded.
    state = _sharded_state(networks, optimizer if schedule.num_steps else None, is_loading=False)
    state["schedule"] = schedule.state_dict()
    state["optimizer_form"] = asdict(form)
    state["rng"] = device.rng_state()
    with _ordinary_errors():
        dist_checkpointing.save(state, str(folder))


def save_weights(folder: Path, networks: Sequence[Any]) -> None:
    """`save` of networks that nobody trains."""
    from megatron.core import dist_checkpointing

    with _ordinary_errors():
        dist_checkpointing.save(_sharded_state(networks, None, is_loading=False), str(folder))


def load(
    folder: Path, networks: Sequence[Any], optimizer: Any, schedule: Any, form: OptimizerForm, with_optimizer: bool, with_rng: bool
) -> None:
    """Collective. Without optimizer only weights are taken, the optimizer and its schedule start anew.

    Raises ValueError for a folder that holds more than data, before anything is unpickled, and for an optimizer of another form.
    """
    from megatron.core import dist_checkpointing

    refuse_code(folder)
    with _ordinary_errors():
        common = dist_checkpointing.load_common_state_dict(str(folder))
        takes_optimizer = with_optimizer and common["schedule"]["num_steps"] > 0
        if takes_optimizer:
            form.check(common.get("optimizer_form"), folder)
        wanted = _sharded_state(networks, optimizer if takes_optimizer else None, is_loading=True)
        state = dist_checkpointing.load(wanted, str(folder))
    for key, network in _by_key(networks).items():
        load_network(network, state[key])
    if "optimizer" not in wanted:
        # In bfloat16 it trains float32 copies of its own, and would put the weights from before back.
        optimizer.reload_model_params()
    else:
        settings = [{key: group[key] for key in _SETTINGS} for group in optimizer.param_groups]
        optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)
        schedule.load_state_dict(state["schedule"])
    if with_rng:
        device.set_rng_state(state["rng"])


@contextmanager
def _ordinary_errors() -> Iterator[None]:
    """torch's CheckpointException is no Exception: raised in a worker, it would end the process instead of being told."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        reasons = [f"rank {rank}: {' '.join(str(cause).split())}" for rank, (cause, _) in error.failures.items()]
        raise RuntimeError("; ".join(reasons) or "another rank could not read or write its shards") from error


def load_network(network: Any, tensors: dict[str, Any]) -> None:
    own = {name.removeprefix(_MODEL_PREFIX): tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    result = network.load_state_dict(own, strict=False)
    missing = [name for name in result.missing_keys if "_extra_state" not in name]
    if missing or result.unexpected_keys:
        raise ValueError(f"the save does not hold this model: missing {missing[:3]}, unexpected {list(result.unexpected_keys)[:3]}")


def _by_key(networks: Sequence[Any]) -> dict[str, Any]:
    """Virtual stages apart: each counts its layers from its own first one."""
    return {"model" if len(networks) == 1 else f"model{stage}": network for stage, network in enumerate(networks)}


def _sharded_state(networks: Sequence[Any], optimizer: Any | None, is_loading: bool) -> dict[str, Any]:
    models = {key: network.sharded_state_dict(prefix=_MODEL_PREFIX) for key, network in _by_key(networks).items()}
    state: dict[str, Any] = dict(models)
    if optimizer is not None:
        # fully_reshardable: the default of 0.16 cannot be loaded without TransformerEngine. 0.12 has no such choice.
        metadata = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
        options = {} if megatron_is_0_12() else {"metadata": metadata}
        state["optimizer"] = optimizer.sharded_state_dict(models, is_loading=is_loading, **options)
    return state
