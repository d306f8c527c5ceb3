"""Every verb of an engine in turn, with the device given away after each: what comes out, down to the last bit."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm_rl.config.plan import TrainPlan
from mindspeed_mm_rl.types import Batch, ImageFeatures, Images
from tests.layout_ranks import make_batch, make_images, own_rows

EVERYTHING = ("param", "grad", "optimizer", "reference")
Digests = dict[str, str]


def run(rank: int, world: int, address: str, plan: TrainPlan, role: str, folder: Path) -> Digests:
    """A rank of RankPool. role: actor, critic or vision; folder: with two empty folders for saves, first and last."""
    from mindspeed_mm_rl.platforms import device

    device.set_threads(1)
    device.adapt_megatron()
    from mindspeed_mm_rl.engines.megatron import process_groups

    process_groups.initialize(plan, rank, world, address)
    try:
        return {"actor": _actor_phases, "critic": _critic_phases, "vision": _vision_phases}[role](plan, folder)
    finally:
        process_groups.destroy()


def _actor_phases(plan: TrainPlan, folder: Path) -> Digests:
    from mindspeed_mm_rl.algorithms.losses import PolicyLossSettings, clipped_policy_loss
    from mindspeed_mm_rl.engines.megatron.engine import MegatronTrainEngine

    engine = MegatronTrainEngine(plan, with_reference=True, entropy_bonus=False, publish_vision=True)
    batch, images, rows = inputs(engine, plan)
    loss = functools.partial(clipped_policy_loss, settings=PolicyLossSettings(0.2, 0.28, kl_coef=0.05))
    pictures = images
    if engine.vision_is_frozen and images and engine.networks[0].pre_process:
        pictures = _alone(engine, lambda: engine.encode(images))
    verbs = {
        "ref_logprobs": lambda: engine.ref_logprobs(batch, rows, pictures),
        "logprobs": lambda: engine.logprobs(batch, rows, pictures),
        "update": lambda: engine.update(request(batch, rows), pictures, loss),
    }
    return _phases(engine, verbs, lambda: _published(engine), folder)


def _critic_phases(plan: TrainPlan, folder: Path) -> Digests:
    from mindspeed_mm_rl.algorithms.losses import ValueLossSettings, clipped_value_loss
    from mindspeed_mm_rl.engines.megatron.critic import MegatronCriticEngine

    engine = MegatronCriticEngine(plan)
    torch.nn.init.normal_(engine.network.text_decoder.output_layer.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    engine.optimizer.reload_model_params()
    batch, _, rows = inputs(engine, plan)
    batch = batch.with_column("values", _batch_column(batch, 2)).with_column("returns", _batch_column(batch, 3))
    loss = functools.partial(clipped_value_loss, settings=ValueLossSettings(0.2))
    verbs = {"values": lambda: engine.values(batch, rows, {}), "update": lambda: engine.update(request(batch, rows), {}, loss)}
    return _phases(engine, verbs, dict, folder)


def _vision_phases(plan: TrainPlan, folder: Path) -> Digests:
    from mindspeed_mm_rl.engines.megatron.vision import TrainedVisionEngine

    engine = TrainedVisionEngine(plan, with_reference=True)
    images = make_images(Path(plan.hf_path))
    gradients = {key: torch.ones_like(features.embeddings) for key, features in engine.encode(images).items()}
    verbs = {
        "ref_encode": lambda: _features(engine.ref_encode(images)),
        "encode": lambda: _features(engine.encode(images)),
        "update": lambda: engine.step(engine.backward(images, [gradients])),
    }
    return _phases(engine, verbs, lambda: _published(engine), folder)


def _features(table: dict[str, ImageFeatures]) -> list[torch.Tensor]:
    return [features.embeddings for features in table.values()]


def _phases(engine: Any, verbs: dict[str, Callable[[], Any]], publish: Callable[[], Any], folder: Path) -> Digests:
    """verbs, the update among them last. Twice in a row without anybody between them, too: nothing leaves that is needed next."""
    seen: Digests = {}
    for name, verb in verbs.items():
        seen[name] = _digest(_alone(engine, verb))
    for name, verb in verbs.items():
        seen[f"{name} again"] = _digest(verb())
    seen["published"] = _digest(_alone(engine, publish))
    _alone(engine, lambda: engine.save(folder / "first"))
    seen["after a save"] = _digest(_alone(engine, verbs["update"]))
    _alone(engine, lambda: engine.load(folder / "first"))
    seen["after a load"] = _digest(_alone(engine, verbs["update"]))
    for name, verb in verbs.items():
        seen[f"{name} at last"] = _digest(_alone(engine, verb))
    engine.save(folder / "last")
    seen["state"] = _digest(list(_state(engine)))
    assert seen["after a load"] == seen["after a save"] != seen["update"]
    return seen


def _alone(engine: Any, verb: Callable[[], Any]) -> Any:
    answer = verb()
    engine.offload()
    left = sum(
        tensor.untyped_storage().nbytes() for part in set(EVERYTHING) & set(engine.plan.offload) for tensor in _tensors(engine, part)
    )
    assert left == 0
    return answer


def _tensors(engine: Any, part: str) -> Iterable[torch.Tensor]:
    if part in ("param", "reference"):
        return [p for network in (engine.networks if part == "param" else engine.references) for p in network.parameters()]
    if part == "grad":
        return [p.main_grad for network in engine.networks for p in network.parameters() if p.requires_grad]
    states = [state for one in engine.optimizer.chained_optimizers for state in one.optimizer.state.values()]
    return [value for state in states for name, value in state.items() if name != "step"]


def _state(engine: Any) -> Iterable[torch.Tensor]:
    """Weights, float32 weights and moments, while they are there."""
    yield from _tensors(engine, "param")
    yield from _tensors(engine, "optimizer")
    for part in engine.optimizer.chained_optimizers:
        yield from (parameter for group in part.optimizer.param_groups for parameter in group["params"])


def _published(engine: Any) -> list[torch.Tensor]:
    from mindspeed_mm_rl.weights.host import open_views

    handle = engine.publish_weights()
    # The buffer is whole when all ranks have returned.
    torch.distributed.barrier()
    return [tensor.clone() for _, tensor in open_views(handle)] if handle else []


def inputs(engine: Any, plan: TrainPlan) -> tuple[Batch, Images, list[int]]:
    images = make_images(Path(plan.hf_path)) if engine.architecture.vision and plan.with_vision else {}
    batch = make_batch(engine.architecture, images)
    return batch, images, own_rows(batch)


def _batch_column(batch: Batch, seed: int) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {i: torch.randn(length, generator=generator) for i, length in zip(batch.sample_ids, batch.responses.lengths, strict=True)}


def request(batch: Batch, rows: list[int]) -> Any:
    from mindspeed_mm_rl.engines.base import UpdateRequest

    return UpdateRequest(batch, rows, float(batch.loss_mask.values.sum()), float(len(batch)))


def _digest(value: Any) -> str:
    """Of tensors and numbers in dicts and lists."""
    hashed = hashlib.sha256()
    for leaf in torch.utils._pytree.tree_leaves(value):
        tensor = leaf if isinstance(leaf, torch.Tensor) else torch.tensor(leaf, dtype=torch.float64)
        hashed.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()
