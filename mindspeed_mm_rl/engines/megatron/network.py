"""What the engines of policy and critic share: a network on megatron-core, packed micro-batches, one optimizer step per mini-batch.

Batch --micro_batches--> MicroBatch --stages of the network--> hidden [T, H] --a head at response places--> numbers per response token [N]
                                                                               '--> loss / global denominators --> gradients --> step
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm_rl.config.plan import TrainPlan
from mindspeed_mm_rl.data.packing import micro_batches
from mindspeed_mm_rl.engines.base import UpdateRequest
from mindspeed_mm_rl.engines.megatron import process_groups, saves
from mindspeed_mm_rl.engines.megatron.encoding import PictureEncoder
from mindspeed_mm_rl.engines.megatron.micro_batch import MicroBatch, grids_by_row, masked, pack
from mindspeed_mm_rl.engines.megatron.offload import OffloadedState, gradient_tensors, network_tensors, optimizer_tensors
from mindspeed_mm_rl.engines.megatron.optimizer import build_optimizer, build_schedule, ready_gradients, step, wrap_for_data_parallel
from mindspeed_mm_rl.models.attention import PackedLayout
from mindspeed_mm_rl.models.context_parallel import joined
from mindspeed_mm_rl.models.families import Architecture
from mindspeed_mm_rl.models.placement import Piece
from mindspeed_mm_rl.models.qwen2_5_vl import AnyNetwork, Network, build_network
from mindspeed_mm_rl.models.rank_pieces import chunk_pieces, grid_entries
from mindspeed_mm_rl.platforms import device
from mindspeed_mm_rl.platforms.compat import tell_virtual_stage
from mindspeed_mm_rl.types import Batch, ImageFeatures, ImageInput, Images

Head = Callable[[Any, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]
"""(network, hidden [n, H], targets [n]) -> numbers [n] of each response token."""
LossOf = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""(micro-batch, the head's numbers [N] of all its response tokens ...) -> this micro-batch's part of the loss, and of the metrics, of
the whole mini-batch."""
ReadPieces = Callable[[Sequence[Piece]], dict[str, torch.Tensor]]
"""The tensors of some pieces, by their names."""


def new_networks(
    kind: type[AnyNetwork], architecture: Architecture, plan: TrainPlan, config: Mapping[str, Any], read: ReadPieces
) -> list[AnyNetwork]:
    """This process's networks, one for each virtual stage. config: that of the weights, with a value head for a value model."""
    grid, place = process_groups.grid(plan, architecture.text.num_layers), process_groups.grid_place()
    table = grid_entries(config, grid, plan.with_vision)
    networks = []
    for virtual in range(grid.virtual):
        tell_virtual_stage(virtual)
        network = build_network(
            kind,
            architecture,
            pipeline_rank=place.pipeline,
            virtual=virtual,
            freeze_vision=plan.freeze_vision,
            freeze_projector=plan.freeze_projector,
            with_vision=plan.with_vision,
            grid=grid,
            dtype=getattr(torch, plan.dtype),
            context_parallel_size=plan.context_parallel_size,
            context_parallel_algorithm=plan.context_parallel_algorithm,
            sequence_parallel=plan.sequence_parallel,
            recompute=plan.recompute,
            recompute_method=plan.recompute_method,
            recompute_num_layers=plan.recompute_num_layers,
            deterministic=plan.deterministic,
        )
        network.load_weights(read(chunk_pieces(table, grid, place, virtual)))
        networks.append(network)
    return networks


class NetworkEngine:
    """This process's part of a network, with optimizer and schedule. A subclass adds the head, the loss and the verbs."""

    def __init__(self, plan: TrainPlan, networks: list[Any]) -> None:
        """Needs process_groups.initialize first."""
        self.plan, self.networks = plan, networks
        self.architecture: Architecture = networks[0].architecture
        self.dtype = getattr(torch, plan.dtype)
        self.models = wrap_for_data_parallel(networks, plan.optimizer)
        self.optimizer = build_optimizer(self.models, plan.optimizer, self.dtype)
        self.schedule = build_schedule(self.optimizer, plan.optimizer)
        self._finish_config()
        self.pictures = PictureEncoder(plan) if self.architecture.vision else None
        self.vision_is_frozen = plan.freeze_vision and plan.freeze_projector
        self.references: list[Any] = []
        """Frozen networks that this one is compared with."""
        parts = {
            "param": lambda: network_tensors(self.networks),
            "reference": lambda: network_tensors(self.references),
            "grad": lambda: gradient_tensors(self.models),
            "optimizer": lambda: optimizer_tensors(self.optimizer),
        }
        self.state = OffloadedState(plan.offload, parts, self.whole_parameters)

    def offload(self) -> None:
        """Gives the device to others, as far as plan.offload goes. Whatever is asked next brings back what it needs."""
        self.state.hold()

    def take_seconds(self) -> dict[str, float]:
        return self.state.take_seconds()

    @property
    def network(self) -> Any:
        """The last virtual stage's: of the pipeline's last rank the one with the head."""
        return self.networks[-1]

    def _finish_config(self) -> None:
        from megatron.core.distributed import finalize_model_grads

        no_sync = [model.no_sync for model in self.models]
        for network in self.networks:
            config = network.config
            # Token counts stay out: the loss already divides by the global denominator, and 0.12.1 counts without context parallel.
            config.finalize_model_grads_func = lambda model, num_tokens=None, **options: finalize_model_grads(model, None, **options)
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
            config.grad_scale_func = self.optimizer.scale_loss

    # ------------------------------------------------------------------ pictures

    def _encoder(self) -> PictureEncoder:
        if self.pictures is None:
            raise ValueError(f"{self.plan.hf_path}: the model has no vision encoder but a prompt has a picture")
        return self.pictures

    def _image_features(self, network: Any, micro: MicroBatch, images: Images) -> torch.Tensor | None:
        """[image tokens, hidden] in packed order; a trainable encoder is run here, inside the gradient, each network's own."""
        if not micro.image_keys or not network.pre_process:
            return None
        distinct = {key: images[key] for key in micro.image_keys}
        pixels = [image for image in distinct.values() if isinstance(image, ImageInput)]
        embedded = {key: image.embeddings.to(device.current()) for key, image in distinct.items() if isinstance(image, ImageFeatures)}
        if pixels:
            embedded |= dict(zip([image.key for image in pixels], self._encoder().one_pass(network, pixels), strict=True))
        return torch.cat([embedded[key] for key in micro.image_keys])

    # ------------------------------------------------------------------ forward

    def _scheduled(
        self, models: list[Any], micros: list[MicroBatch], images: Images, outcome: Callable[..., Any], **how: bool
    ) -> list[Any]:
        """Every micro-batch through all stages by megatron's schedule; what `outcome` made of each, on the last stage, else []."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        return get_forward_backward_func()(
            forward_step_func=partial(self._forward_step, images=images, outcome=outcome),
            data_iterator=[iter(micros) for _ in models] if len(models) > 1 else iter(micros),
            model=models if len(models) > 1 else models[0],
            num_microbatches=len(micros),
            # Both are asked for and, with variable lengths, not used.
            seq_length=self.plan.max_tokens_per_micro_batch,
            micro_batch_size=1,
            **how,
        )

    def _forward_step(self, micros: Iterator[MicroBatch], model: Any, images: Images, outcome: Callable[..., Any]) -> tuple[Any, Any]:
        micro = next(micros)
        network = model if isinstance(model, Network) else model.module
        layout = network.layout(micro.token_rows, grids_by_row(micro, images))
        hidden = model(micro.tokens.to(device.current()), layout, self._image_features(network, micro, images))
        return hidden, partial(outcome, micro, network, layout)

    def _in_step(self, batch: Batch, rows: Sequence[int]) -> tuple[list[MicroBatch], int]:
        """Micro-batches of `rows`, of which the first so many count: behind them a sample without weight, as often as it takes.

        Every data-parallel rank runs the same number, for experts may be dealt to all of them; virtual stages want a multiple of the
        pipeline's ranks.
        """
        share = batch.select(rows)
        plan, together = self.plan, self.plan.rows_together
        bounds = plan.max_tokens_per_micro_batch, plan.max_samples_per_micro_batch, together
        micros = [pack(share, own) for own in micro_batches(share.total_lengths(), *bounds)]
        rounds = int(process_groups.data_parallel_max(len(micros)))
        if len(self.networks) > 1:
            rounds += -rounds % plan.pipeline_parallel_size
        return micros + [pack(masked(batch, together), range(together))] * (rounds - len(micros)), len(micros)

    def _at_responses(
        self, head: Head, micro: MicroBatch, network: Any, layout: PackedLayout, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The head's numbers [N] of all response tokens of a micro-batch, wherever their hidden states lie."""
        index, targets = micro.hidden_index.to(hidden.device), micro.targets.to(hidden.device)
        if layout.share is None:
            return head(network, hidden[index], targets)
        mine, there = layout.share.local(index)
        return tuple(joined(values, mine) for values in head(network, hidden[there], targets[mine]))

    @torch.no_grad()
    def _by_sample(self, networks: list[Any], head: Head, batch: Batch, rows: Sequence[int], images: Images) -> dict[int, torch.Tensor]:
        """The head's first number for each response token, where this rank has the last stage and answers for its replica."""

        is_reference = networks is self.references
        self.state.hold("reference" if is_reference else "param")
        if not is_reference:
            self._whole_where_calls_differ()

        def outcome(micro: MicroBatch, network: Any, layout: PackedLayout, hidden: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
            return self._at_responses(head, micro, network, layout, hidden)[0]

        micros, count = self._in_step(batch, rows)
        values = self._scheduled(networks, micros, images, outcome, forward_only=True, collect_non_loss_data=True)
        answer: dict[int, torch.Tensor] = {}
        if process_groups.speaks():
            for micro, found in list(zip(micros, values, strict=False))[:count]:
                answer |= dict(zip(micro.batch.sample_ids, found.cpu().split(micro.response_lengths), strict=True))
        return answer

    # ------------------------------------------------------------------ update

    def _gradients(self, request: UpdateRequest, images: Images, head: Head, loss_of: LossOf) -> dict[str, float]:
        """Forward and backward; returns the loss's metrics of the global mini-batch, on the last stage."""

        def outcome(micro: MicroBatch, network: Any, layout: PackedLayout, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
            loss, metrics = loss_of(micro, *self._at_responses(head, micro, network, layout, hidden))
            # The token count is unused (see _finish_config); megatron asks for an int tensor.
            return loss, torch.ones((), dtype=torch.int, device=loss.device), {k: v.detach() for k, v in metrics.items()}

        self.state.hold("param", "grad", "optimizer")
        self._whole_where_calls_differ()
        micros, _ = self._in_step(request.batch, request.rows)
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        collected = self._scheduled(self.models, micros, images, outcome, forward_only=False)
        if not collected:
            return {}
        return process_groups.data_parallel_sum({name: sum(float(part[name]) for part in collected) for name in collected[0]})

    def _step(self) -> dict[str, float]:
        """Of the optimizer, with the gradients that are there."""
        return self.step(ready_gradients(self.optimizer))

    def step(self, grad_norm: float) -> dict[str, float]:
        """Of the optimizer, with the gradients that are ready. grad_norm: of all that is clipped together."""
        self.schedule.step(1)
        step(self.optimizer, self.plan.optimizer.clip_grad, grad_norm)
        return {"grad_norm": grad_norm, "lr": float(self.optimizer.param_groups[0]["lr"])}

    def whole_parameters(self) -> None:
        """Waits for the parameters that other ranks updated, before anybody but a forward pass reads them."""
        if self.plan.optimizer.overlap_param_gather:
            for model in self.models:
                model.start_param_sync(force_sync=True)

    def _whole_where_calls_differ(self) -> None:
        """overlap_param_gather collects what is called in the order of calls, in which a rank without pictures leaves the encoder out."""
        if self.plan.with_vision and not self.vision_is_frozen:
            self.whole_parameters()

    # ------------------------------------------------------------------ saves

    def save(self, folder: Path) -> None:
        self.state.hold("param", "optimizer")
        self.whole_parameters()
        saves.save(folder, self.networks, self.optimizer, self.schedule, self._optimizer_form())

    def load(self, folder: Path) -> None:
        """Resumes from this network's folder of a save, as far as no_load_optim and no_load_rng let it."""
        self.state.hold("param", "optimizer")
        wanted = {"with_optimizer": not self.plan.no_load_optim, "with_rng": not self.plan.no_load_rng}
        saves.load(folder, self.networks, self.optimizer, self.schedule, self._optimizer_form(), **wanted)

    def _optimizer_form(self) -> saves.OptimizerForm:
        return saves.OptimizerForm(self.plan.optimizer.use_distributed_optimizer, self.plan.expert_parallel_size > 1)
