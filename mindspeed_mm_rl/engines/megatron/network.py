"""What the engines of policy and critic share: a network on megatron-core, packed micro-batches, one optimizer step per mini-batch.

Batch --micro_batches--> MicroBatch --network--> hidden [T, H] --a head at response places--> one number per response token [N]
                                                                  '--> loss / global denominators --> gradients --> step
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm_rl.config.plan import TrainPlan
from mindspeed_mm_rl.data.images import pixel_values, read_image_settings
from mindspeed_mm_rl.data.packing import micro_batches
from mindspeed_mm_rl.engines.base import UpdateRequest
from mindspeed_mm_rl.engines.megatron import process_groups, saves
from mindspeed_mm_rl.engines.megatron.micro_batch import MicroBatch, grids_by_row, masked, pack
from mindspeed_mm_rl.engines.megatron.optimizer import build_optimizer, build_schedule, wrap_for_data_parallel
from mindspeed_mm_rl.models.families import Architecture
from mindspeed_mm_rl.models.qwen2_5_vl import AnyNetwork, build_network
from mindspeed_mm_rl.platforms import device
from mindspeed_mm_rl.types import Batch, ImageFeatures, ImageInput, Images

Head = Callable[[MicroBatch, torch.Tensor], torch.Tensor]
"""(micro-batch, hidden [T, H]) -> one number per response token [N]."""
LossOf = Callable[[MicroBatch, torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""(micro-batch, hidden [T, H]) -> this micro-batch's part of the loss, and of the metrics, of the whole mini-batch."""


def new_network(kind: type[AnyNetwork], architecture: Architecture, plan: TrainPlan, weights: dict[str, torch.Tensor]) -> AnyNetwork:
    network = build_network(
        kind,
        architecture,
        dtype=getattr(torch, plan.dtype),
        tensor_parallel_size=plan.tensor_parallel_size,
        pipeline_parallel_size=plan.pipeline_parallel_size,
        context_parallel_size=plan.context_parallel_size,
        sequence_parallel=plan.sequence_parallel,
        freeze_vision=plan.freeze_vision,
        freeze_projector=plan.freeze_projector,
        recompute=plan.recompute,
        deterministic=plan.deterministic,
    )
    network.load_weights(weights)
    return network


class NetworkEngine:
    """A network, its optimizer and schedule. A subclass adds the head, the loss and the verbs."""

    def __init__(self, plan: TrainPlan, network: Any) -> None:
        """Needs process_groups.initialize first."""
        self.plan, self.network = plan, network
        self.architecture: Architecture = network.architecture
        self.dtype = getattr(torch, plan.dtype)
        self.model = wrap_for_data_parallel(network, plan.optimizer)
        self.optimizer = build_optimizer(self.model, plan.optimizer, self.dtype)
        self.schedule = build_schedule(self.optimizer, plan.optimizer)
        self._finish_config()
        self.image_settings = read_image_settings(plan.hf_path, plan.min_pixels, plan.max_pixels) if self.architecture.vision else None
        self.vision_is_frozen = plan.freeze_vision and plan.freeze_projector

    def _finish_config(self) -> None:
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.enums import ModelType

        self.network.model_type = ModelType.encoder_or_decoder
        config = self.network.config
        # Token counts stay out of it: the loss already divides by the global denominator, and 0.12.1 counts them without context parallel.
        config.finalize_model_grads_func = lambda model, num_tokens=None, **options: finalize_model_grads(model, None, **options)
        config.no_sync_func = self.model.no_sync
        config.grad_scale_func = self.optimizer.scale_loss

    # ------------------------------------------------------------------ pictures

    def _encode(self, network: Any, images: list[ImageInput]) -> list[torch.Tensor]:
        if self.image_settings is None:
            raise ValueError(f"{self.plan.hf_path}: the model has no vision encoder but a prompt has {len(images)} picture(s)")
        pixels, grids = pixel_values(images, self.image_settings)
        embeddings = network.encode_images(pixels.to(device.current(), self.dtype), grids)
        return list(embeddings.split([image.num_tokens(self.image_settings.merge_size) for image in images]))

    def _image_features(self, network: Any, micro: MicroBatch, images: Images) -> torch.Tensor | None:
        """[image tokens, hidden] in packed order; a trainable encoder is run here, inside the gradient, each network's own."""
        if not micro.image_keys:
            return None
        distinct = {key: images[key] for key in micro.image_keys}
        pixels = [image for image in distinct.values() if isinstance(image, ImageInput)]
        embedded = {key: image.embeddings.to(device.current()) for key, image in distinct.items() if isinstance(image, ImageFeatures)}
        if pixels:
            embedded |= dict(zip([image.key for image in pixels], self._encode(network, pixels), strict=True))
        return torch.cat([embedded[key] for key in micro.image_keys])

    # ------------------------------------------------------------------ forward

    def _forward(self, network: Any, micro: MicroBatch, images: Images) -> torch.Tensor:
        layout = network.layout(micro.token_rows, grids_by_row(micro, images))
        return network(micro.tokens.to(device.current()), layout, self._image_features(network, micro, images))

    def _micro_batches(self, batch: Batch) -> list[list[int]]:
        return micro_batches(batch.total_lengths(), self.plan.max_tokens_per_micro_batch, self.plan.max_samples_per_micro_batch)

    @torch.no_grad()
    def _by_sample(self, network: Any, head: Head, batch: Batch, images: Images) -> dict[int, torch.Tensor]:
        answer: dict[int, torch.Tensor] = {}
        for rows in self._micro_batches(batch):
            micro = pack(batch, rows)
            values = head(micro, self._forward(network, micro, images))
            answer |= dict(zip(micro.batch.sample_ids, values.cpu().split(micro.response_lengths), strict=True))
        return answer

    # ------------------------------------------------------------------ update

    def _gradients(self, request: UpdateRequest, images: Images, loss_of: LossOf) -> dict[str, float]:
        """Forward and backward; returns the loss's metrics of the global mini-batch."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        micros = self._in_step(request)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        collected = get_forward_backward_func()(
            forward_step_func=partial(self._training_step, images=images, loss_of=loss_of),
            data_iterator=iter(micros),
            model=self.model,
            num_microbatches=len(micros),
            seq_length=self.plan.max_tokens_per_micro_batch,
            micro_batch_size=1,
            forward_only=False,
        )
        return process_groups.data_parallel_sum({name: sum(float(part[name]) for part in collected) for name in collected[0]})

    def _in_step(self, request: UpdateRequest) -> list[MicroBatch]:
        """Every data-parallel rank runs the same number of micro-batches; a short rank runs a sample without weight."""
        share = request.batch.select(request.rows)
        micros = [pack(share, rows) for rows in self._micro_batches(share)]
        rounds = int(process_groups.data_parallel_max(len(micros)))
        return micros + [pack(masked(request.batch), [0])] * (rounds - len(micros))

    def _training_step(self, micros: Iterator[MicroBatch], model: Any, images: Images, loss_of: LossOf) -> tuple[torch.Tensor, Any]:
        micro = next(micros)

        def with_token_count(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            loss, metrics = loss_of(micro, hidden)
            # The token count is unused (see _finish_config); megatron asks for an int tensor.
            return loss, torch.ones((), dtype=torch.int, device=loss.device), {k: v.detach() for k, v in metrics.items()}

        return self._forward(self.network, micro, images), with_token_count

    def _step(self) -> dict[str, float]:
        """Of the optimizer, with the gradients that are there."""
        self.schedule.step(1)
        succeeded, grad_norm, _ = self.optimizer.step()
        if not succeeded:
            raise RuntimeError(f"the optimizer skipped a step: the gradient is not finite (norm {grad_norm})")
        return {"grad_norm": float(grad_norm), "lr": float(self.optimizer.param_groups[0]["lr"])}

    # ------------------------------------------------------------------ saves

    def save(self, folder: Path) -> None:
        saves.save(folder, self.network, self.optimizer, self.schedule)

    def load(self, folder: Path) -> None:
        """Resumes from this network's folder of a save, as far as no_load_optim and no_load_rng let it."""
        wanted = {"with_optimizer": not self.plan.no_load_optim, "with_rng": not self.plan.no_load_rng}
        saves.load(folder, self.network, self.optimizer, self.schedule, **wanted)
