"""How much memory a plan takes on a device, phase by phase, and on its node: an estimate, made before anything is started.

pieces of a rank (models/rank_pieces.py) --> State: what it holds, exact but for padding
                                         '-> activations: what a micro-batch leaves for the backward pass, a rule of thumb
phase = what the working process holds and computes with + what the others of the device keep while they wait
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from mindspeed_mm_rl.config.plan import OffloadPart, Plan, RolloutPlan, TrainPlan
from mindspeed_mm_rl.engines.megatron.process_groups import grid as grid_of
from mindspeed_mm_rl.models.families import Architecture, TextArchitecture
from mindspeed_mm_rl.models.names import Entry, entries, with_value_head
from mindspeed_mm_rl.models.placement import Piece
from mindspeed_mm_rl.models.rank_pieces import Grid, GridPlace, chunk_pieces, grid_entries

_PROCESS_BYTES = 1 << 30
"""Of each process on a device: its context, and the buffers of its collectives."""
_ENGINE_BYTES = 3 << 30
"""What the rollout engine needs beside weights and cache: activations of a step, graphs."""
_HEAD_BYTES = 320 << 20
"""A chunk of logits (heads.CHUNK_LOGITS): as they come out, in float32, their probabilities, a gradient."""
_LOOSE = 1.25
"""What an allocator holds over what it has handed out, where tensors of many sizes come and go."""
KEPT, WORKING = 2, 3
"""Times what a layer's matrices put out: what the layer keeps for its backward pass, and what this pass has at its peak."""
_UNEVEN = 1.5
"""Tokens of the busiest rank's experts over the mean."""
_CHUNKS_BYTES = 1 << 30
"""Weights on their way to the rollout engine through the device (weights/device.py)."""
_PATCHES_PER_PASS = 16384
_VISION_PARTS = ("vision", "projector")


@dataclass(frozen=True)
class State:
    """Bytes that one rank's network, its gradients and its optimizer take."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0

    def __add__(self, other: State) -> State:
        return State(self.parameters + other.parameters, self.gradients + other.gradients, self.optimizer + other.optimizer)


@dataclass(frozen=True)
class Trainer:
    """A group of processes that train, or only encode; the bytes of the stage that has most."""

    state: State
    forward: int
    """Activations without a backward pass."""
    backward: int
    reference: int
    leaves: tuple[OffloadPart, ...]

    def held(self, *wanted: OffloadPart) -> int:
        """As engines/megatron/offload.py has it: what isn't wanted has left, if it may."""
        parts = {
            "param": self.state.parameters,
            "grad": self.state.gradients,
            "optimizer": self.state.optimizer,
            "reference": self.reference,
        }
        return sum(size for name, size in parts.items() if name in wanted or name not in self.leaves)

    @property
    def update(self) -> int:
        return self.held("param", "grad", "optimizer") + self.backward

    @property
    def on_host(self) -> int:
        """Pinned memory for what leaves; of gradients nothing is kept."""
        kept = {"param": self.state.parameters, "optimizer": self.state.optimizer, "reference": self.reference}
        return sum(size for name, size in kept.items() if name in self.leaves)


@dataclass(frozen=True)
class Rollout:
    weights: int
    """Bytes of one process."""
    cache: int
    """Bytes for keys and values; negative where there is no room for weights and activations."""
    token: int
    """Bytes of one token's keys and values."""

    @property
    def cached_tokens(self) -> int:
        return max(0, self.cache) // self.token


@dataclass(frozen=True)
class Phase:
    """Example: Phase("update", 31 << 30, 3 << 30)"""

    name: str
    """As in the metrics memory/<name>/peak_gb."""
    working: int
    waiting: int
    """Bytes that the other processes of the device keep meanwhile."""

    @property
    def total(self) -> int:
        return self.working + self.waiting


@dataclass(frozen=True)
class Footprint:
    phases: tuple[Phase, ...]
    """Of the device that has most."""
    rollout: Rollout | None
    """None: nothing is sampled."""
    trainer: Trainer
    host: int
    """Bytes on the node's memory for each device."""
    host_once: int
    """And once for each node: the weights on their way to the rollout engine."""

    @property
    def most(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    def on_node(self, devices: int) -> int:
        return self.host * devices + self.host_once


def footprint(plan: Plan, architecture: Architecture, device_bytes: int) -> Footprint:
    """device_bytes: of one device; on CPU, where nothing leaves and sleeps, a process's share of the machine."""
    devices, on_cpu = plan.run.num_devices, plan.run.device == "cpu"
    longest = plan.data.max_pair_length if plan.preference else plan.rollout.max_model_len
    actor = _trainer(plan.train, architecture, devices, longest, plan.needs_reference)
    others = {
        "critic": _trainer(plan.critic, architecture, devices, longest, False, has_value_head=True) if plan.critic else None,
        "vision": _vision_workers(plan, architecture, devices) if plan.vision else None,
    }
    served = [] if plan.preference else _served(plan.rollout, architecture)
    rollout = _rollout(plan.rollout, architecture.text, served, device_bytes, on_cpu) if served else None
    groups = {"actor": actor, **{name: group for name, group in others.items() if group}}
    waiting = {name: _idle(group) for name, group in groups.items()} | ({"rollout": _asleep(rollout, on_cpu)} if rollout else {})
    phases = [Phase(name, _PROCESS_BYTES + work, sum(waiting.values()) - waiting[group]) for name, group, work in _work(plan, groups)]
    if rollout:
        awake = rollout.weights + rollout.cache if on_cpu else round(plan.rollout.gpu_memory_utilization * device_bytes)
        phases.insert(0, Phase("rollout", awake, sum(waiting.values()) - waiting["rollout"]))
        phases.append(_push(plan, actor, awake, sum(waiting.values()) - waiting["actor"]))
    weights = _element(plan.rollout) * sum(math.prod(entry.mm_shape) for entry in served if plan.rollout.weight_carrier == "host")
    asleep_on_host = rollout.weights if rollout and not on_cpu else 0
    return Footprint(tuple(phases), rollout, actor, sum(group.on_host for group in groups.values()) + asleep_on_host, weights)


def _work(plan: Plan, groups: Mapping[str, Trainer]) -> Iterable[tuple[str, str, int]]:
    """(phase, group that works, its bytes), in the order of an iteration."""
    actor = groups["actor"]
    if "vision" in groups:
        yield "image_embeds", "vision", groups["vision"].held("param") + groups["vision"].forward
    if plan.needs_reference:
        yield "reference_model", "actor", actor.held("reference") + actor.forward
    if not plan.preference and not plan.run.on_policy:
        yield "old_log_p", "actor", actor.held("param") + actor.forward
    if "critic" in groups:
        yield "critic_model", "critic", groups["critic"].held("param") + groups["critic"].forward
        yield "update_critic", "critic", groups["critic"].update
    trained_beside = groups["vision"].update if "vision" in groups and not _frozen(plan.train) else 0
    yield "update", "actor", actor.update + trained_beside


def _push(plan: Plan, actor: Trainer, awake: int, waiting: int) -> Phase:
    """awake: bytes of the rollout engine, which loads while the actor still holds its weights where they go through the device."""
    own = _PROCESS_BYTES + actor.held("param")
    if plan.rollout.weight_carrier == "device":
        return Phase("resharding_to_infer", own + _CHUNKS_BYTES, waiting + awake)
    return Phase("resharding_to_infer", own, waiting)


def _idle(group: Trainer) -> int:
    return _PROCESS_BYTES + group.held()


def _asleep(rollout: Rollout, on_cpu: bool) -> int:
    return rollout.weights + rollout.cache if on_cpu else _PROCESS_BYTES


def _element(plan: TrainPlan | RolloutPlan) -> int:
    """Bytes of a number."""
    return 2 if plan.dtype == "bfloat16" else 4


def _frozen(plan: TrainPlan) -> bool:
    return plan.freeze_vision and plan.freeze_projector


# ---------------------------------------------------------------------- trainers


def _trainer(
    plan: TrainPlan, architecture: Architecture, devices: int, longest: int, with_reference: bool, has_value_head: bool = False
) -> Trainer:
    """longest: tokens of the longest sequence, which may be more than a pack holds."""
    grid = grid_of(plan, architecture.text.num_layers)
    config = with_value_head(architecture.raw) if has_value_head else architecture.raw
    table = grid_entries(config, grid, plan.with_vision)
    tokens = max(plan.max_tokens_per_micro_batch, longest) // plan.context_parallel_size
    stages = [
        _stage(plan, architecture.text, stage_pieces(table, grid, pipeline), pipeline, grid, devices, tokens)
        for pipeline in range(grid.pipeline)
    ]
    if with_reference:
        stages = [replace(stage, reference=stage.state.parameters) for stage in stages]
    heaviest = max(stages, key=lambda stage: stage.update)
    # The phases' heaviest stages may be several; none of them is forgotten so.
    return replace(
        heaviest,
        forward=max(stage.forward for stage in stages),
        reference=max(stage.reference for stage in stages),
    )


def stage_pieces(table: Sequence[Entry], grid: Grid, pipeline: int) -> list[Piece]:
    """Of one rank of a stage, all virtual stages; the ranks of a stage hold as much as each other."""
    layers = {number for virtual in range(grid.virtual) for number in grid.layer_numbers(pipeline, virtual)}
    near = [entry for entry in table if entry.layer is None or entry.part != "text" or entry.layer in layers]
    return [piece for virtual in range(grid.virtual) for piece in chunk_pieces(near, grid, GridPlace(pipeline=pipeline), virtual)]


def state_bytes(pieces: Sequence[Piece], plan: TrainPlan, devices: int) -> State:
    """Of a rank with these pieces."""
    stage = devices // plan.pipeline_parallel_size
    copies = stage // plan.tensor_parallel_size
    expert_copies = stage // (plan.expert_parallel_size * plan.expert_tensor_parallel_size)
    frozen = {"vision": plan.freeze_vision, "projector": plan.freeze_projector, "text": False}
    # Adam's moments, and for bfloat16 a float32 copy of the weights.
    width = 12 if plan.dtype == "bfloat16" else 8
    total = State()
    for piece in pieces:
        count = math.prod(piece.entry.mm_shape)
        shards = (copies if piece.entry.expert is None else expert_copies) if plan.optimizer.use_distributed_optimizer else 1
        trained = 0 if frozen[piece.entry.part] else count
        own = -(-trained // shards)
        total += State(_element(plan) * count, 4 * trained, width * own)
    return total


def _stage(
    plan: TrainPlan, text: TextArchitecture, pieces: Sequence[Piece], pipeline: int, grid: Grid, devices: int, tokens: int
) -> Trainer:
    state, element = state_bytes(pieces, plan, devices), _element(plan)
    spread = plan.tensor_parallel_size if plan.sequence_parallel else 1
    layer = max(layer_outputs(pieces, text, spread).values(), default=0.0) * tokens * element
    entering, whole = text.hidden_size * tokens * element // spread, text.hidden_size * tokens * element
    layers = sum(stages[pipeline] for stages in grid.stages)
    micro_batches = in_flight(grid, pipeline)
    ends = (3 * whole + _HEAD_BYTES if pipeline == grid.pipeline - 1 else 0) + (2 * whole if pipeline == 0 else 0)
    vision_forward, vision_backward = _vision_activations(pieces, plan, tokens * element)
    return Trainer(
        state=state,
        forward=round(_LOOSE * (KEPT * layer + ends + vision_forward)),
        backward=round(_LOOSE * (micro_batches * _kept(plan, layers, entering, layer) + _working(plan) * layer + ends + vision_backward)),
        reference=0,
        leaves=plan.offload,
    )


def in_flight(grid: Grid, pipeline: int) -> float:
    """Micro-batches whose activations a stage holds at the most: whole ones, or by the pieces of its virtual stages."""
    behind = grid.pipeline - pipeline - 1
    return 1 + behind if grid.virtual == 1 else (2 * behind + (grid.virtual - 1) * grid.pipeline + 1) / grid.virtual


def _kept(plan: TrainPlan, layers: int, entering: float, layer: float) -> float:
    """Bytes of a micro-batch that so many layers keep for its backward pass."""
    if plan.recompute != "full":
        return layers * KEPT * layer
    if plan.recompute_method == "uniform":
        return -(-layers // plan.recompute_num_layers) * entering
    again = min(layers, plan.recompute_num_layers)
    return again * entering + (layers - again) * KEPT * layer


def _working(plan: TrainPlan) -> int:
    """Times a layer's outputs: of the layers that are run again, what they keep, and the gradients of one."""
    together = plan.recompute_num_layers if plan.recompute == "full" and plan.recompute_method == "uniform" else 1
    return KEPT * (together - 1) + WORKING


def layer_outputs(pieces: Sequence[Piece], text: TextArchitecture, spread: int) -> dict[int | None, float]:
    """Numbers that the matrices of each text layer put out for one token of a pack. spread: ranks that share its residual stream."""
    outputs: dict[int | None, float] = {}
    for piece in pieces:
        entry = piece.entry
        if entry.part != "text" or entry.layer is None or entry.expert is not None:
            continue
        rows = entry.mm_shape[0] / spread if entry.split in ("columns", "replicated") else entry.mm_shape[0]
        outputs[entry.layer] = outputs.get(entry.layer, 0.0) + rows * (len(entry.mm_shape) > 1)
    rows = {
        piece.entry.layer: piece.entry.mm_shape[0] for piece in pieces if piece.entry.expert is not None and piece.entry.kind == "gate_up"
    }
    for layer, own in rows.items():
        # Tokens that an expert gets, and what its gate and up put out; the ranks that share an expert get those of each other.
        ranks = 2 * text.experts.ffn_size / own
        outputs[layer] += _UNEVEN * text.experts.per_token / spread * ranks * (text.hidden_size + own)
    return outputs


def _vision_activations(pieces: Sequence[Piece], plan: TrainPlan, token_bytes: float) -> tuple[float, float]:
    """(frozen, trained) bytes of a pass through the encoder; token_bytes: of a number for each token of a pack."""
    rows: dict[int | None, int] = {}
    for piece in pieces:
        if piece.entry.part == "vision" and len(piece.entry.mm_shape) > 1:
            rows[piece.entry.layer] = rows.get(piece.entry.layer, 0) + piece.entry.mm_shape[0]
    if not rows:
        return 0.0, 0.0
    forward = KEPT * max(rows.values()) * _PATCHES_PER_PASS * _element(plan)
    if _frozen(plan):
        return forward, 0.0
    # Four patches make an image token, and all tokens may be those of images.
    kept = len(rows) + WORKING if plan.recompute == "full" else len(rows) * KEPT
    return forward, 4 * token_bytes * kept * max(rows.values())


def _vision_workers(plan: Plan, architecture: Architecture, devices: int) -> Trainer:
    workers = plan.vision
    table = [entry for entry in entries(architecture.raw) if entry.part in _VISION_PARTS]
    pieces = stage_pieces(table, Grid(((0,),), tensor=workers.tensor_parallel_size), 0)
    forward, backward = _vision_activations(pieces, workers, workers.max_tokens_per_micro_batch * _element(workers))
    state = state_bytes(pieces, workers, devices)
    reference = state.parameters if plan.needs_reference and not _frozen(workers) else 0
    return Trainer(state, round(_LOOSE * forward), round(_LOOSE * backward), reference, workers.offload)


# ---------------------------------------------------------------------- rollout


def _served(plan: RolloutPlan, architecture: Architecture) -> list[Entry]:
    """Weights that the engine has."""
    return [entry for entry in entries(architecture.raw) if entry.part == "text" or not plan.image_embeds]


def _rollout(plan: RolloutPlan, text: TextArchitecture, served: Sequence[Entry], device_bytes: int, on_cpu: bool) -> Rollout:
    weights = round(_element(plan) * sum(_rollout_share(plan, entry) for entry in served))
    cache = plan.kv_cache_bytes if on_cpu else round(plan.gpu_memory_utilization * device_bytes) - weights - _ENGINE_BYTES
    return Rollout(weights, cache, round(_element(plan) * _cached_numbers(plan, text)))


def _rollout_share(plan: RolloutPlan, entry: Entry) -> float:
    """Numbers of a weight on each process: cut by tensor parallel, or the experts dealt out over all processes of the engine."""
    count = math.prod(entry.mm_shape)
    if entry.expert is not None:
        return count / (plan.num_ranks if plan.expert_parallel else plan.tensor_parallel_size)
    return count if entry.split == "replicated" else count / plan.tensor_parallel_size


def _cached_numbers(plan: RolloutPlan, text: TextArchitecture) -> float:
    """Of one token: keys and values of each layer, or the small vector that latent attention makes them of, which is never cut."""
    if text.latent:
        return text.num_layers * (text.latent.kv_lora_rank + text.latent.qk_rope_head_dim)
    return 2 * text.num_layers * text.head_dim * max(1.0, text.num_kv_heads / plan.tensor_parallel_size)
