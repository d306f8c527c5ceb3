"""The train engine: a policy on megatron-core, packed micro-batches, one optimizer step per mini-batch.

Batch --micro_batches--> MicroBatch --policy--> hidden [T, H] --head at response places--> log-probs [N]
                                                                               '--> policy loss / global denominators --> gradients
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm_rl.config.plan import TrainPlan
from mindspeed_mm_rl.data.images import pixel_values, read_image_settings
from mindspeed_mm_rl.data.packing import micro_batches
from mindspeed_mm_rl.engines.base import PolicyLoss, UpdateRequest
from mindspeed_mm_rl.engines.megatron import process_groups, saves
from mindspeed_mm_rl.engines.megatron.micro_batch import MicroBatch, grids_by_row, masked, pack
from mindspeed_mm_rl.engines.megatron.optimizer import build_optimizer, build_schedule, wrap_for_data_parallel
from mindspeed_mm_rl.models.families import read_architecture
from mindspeed_mm_rl.models.heads import token_logprobs
from mindspeed_mm_rl.models.names import PARTS
from mindspeed_mm_rl.models.qwen2_5_vl import build_policy
from mindspeed_mm_rl.models.weight_files import read_megatron_weights
from mindspeed_mm_rl.models.weight_layout import to_hf
from mindspeed_mm_rl.platforms import device
from mindspeed_mm_rl.types import Batch, ImageFeatures, ImageInput, Images, LossInput
from mindspeed_mm_rl.weights.host import HostBuffer, WeightHandle

_PATCHES_PER_ENCODE = 16384
"""Patches that one pass of the frozen vision encoder takes: bounds its activations, not its result."""


class MegatronTrainEngine:
    def __init__(self, plan: TrainPlan, with_reference: bool, entropy_bonus: bool, publish_vision: bool) -> None:
        """Needs process_groups.initialize first. publish_vision: whether the rollout engine runs a vision encoder of its own."""
        self.plan = plan
        self.architecture = read_architecture(plan.hf_path)
        self.dtype = getattr(torch, plan.dtype)
        self.policy = self._build(plan.load)
        self.reference = self._build(plan.reference_load).requires_grad_(False) if with_reference else None
        self.model = wrap_for_data_parallel(self.policy, plan.optimizer)
        self.optimizer = build_optimizer(self.model, plan.optimizer, self.dtype)
        self.schedule = build_schedule(self.optimizer, plan.optimizer)
        self._finish_config()
        self.image_settings = read_image_settings(plan.hf_path, plan.min_pixels, plan.max_pixels) if self.architecture.vision else None
        self.vision_is_frozen = plan.freeze_vision and plan.freeze_projector
        if self.reference is not None and self.vision_is_frozen:
            self._check_shared_vision(self.reference)
        self.entropy_bonus = entropy_bonus
        self.publish_vision = publish_vision
        self.buffer: HostBuffer | None = None

    def _build(self, weights: str) -> Any:
        policy = build_policy(
            self.architecture,
            dtype=self.dtype,
            tensor_parallel_size=self.plan.tensor_parallel_size,
            pipeline_parallel_size=self.plan.pipeline_parallel_size,
            context_parallel_size=self.plan.context_parallel_size,
            sequence_parallel=self.plan.sequence_parallel,
            freeze_vision=self.plan.freeze_vision,
            freeze_projector=self.plan.freeze_projector,
            recompute=self.plan.recompute,
            deterministic=self.plan.deterministic,
        )
        policy.load_weights(read_megatron_weights(weights, self.architecture.raw))
        return policy

    def _check_shared_vision(self, reference: Any) -> None:
        """A frozen vision encoder runs once for policy and reference, so it must be the same in both."""
        others = reference.weights()
        for name, parameter in self.policy.weights().items():
            if name.startswith("image_encoder.") and not torch.equal(parameter, others[name]):
                raise ValueError(
                    f"the vision encoder is frozen, but {name} of the reference ({self.plan.reference_load}, "
                    f"rl_config.integrated_mode_config.ref_model_load_path) differs from that of actor_config.load ({self.plan.load}): "
                    "give a reference with the same vision encoder, or set freeze: false in the model file"
                )

    def _finish_config(self) -> None:
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.enums import ModelType

        self.policy.model_type = ModelType.encoder_or_decoder
        config = self.policy.config
        # Token counts stay out of it: the loss already divides by the global denominator, and 0.12.1 counts them without context parallel.
        config.finalize_model_grads_func = lambda model, num_tokens=None, **options: finalize_model_grads(model, None, **options)
        config.no_sync_func = self.model.no_sync
        config.grad_scale_func = self.optimizer.scale_loss

    # ------------------------------------------------------------------ pictures

    @torch.no_grad()
    def encode(self, images: dict[str, ImageInput]) -> dict[str, ImageFeatures]:
        """Every picture through the frozen vision encoder once."""
        features: dict[str, ImageFeatures] = {}
        keys = list(images)
        patches = [_num_patches(images[key]) for key in keys]
        for group in micro_batches(patches, _PATCHES_PER_ENCODE):
            chosen = [images[keys[i]] for i in group]
            for image, embeddings in zip(chosen, self._encode(self.policy, chosen), strict=True):
                features[image.key] = ImageFeatures(embeddings.cpu(), image.grid_thw)
        return features

    def _encode(self, policy: Any, images: list[ImageInput]) -> list[torch.Tensor]:
        if self.image_settings is None:
            raise ValueError(f"{self.plan.hf_path}: the model has no vision encoder but a prompt has {len(images)} picture(s)")
        pixels, grids = pixel_values(images, self.image_settings)
        embeddings = policy.encode_images(pixels.to(device.current(), self.dtype), grids)
        return list(embeddings.split([image.num_tokens(self.image_settings.merge_size) for image in images]))

    def _image_features(self, policy: Any, micro: MicroBatch, images: Images) -> torch.Tensor | None:
        """[image tokens, hidden] in packed order; a trainable encoder is run here, inside the gradient, each policy's own."""
        if not micro.image_keys:
            return None
        distinct = {key: images[key] for key in micro.image_keys}
        pixels = [image for image in distinct.values() if isinstance(image, ImageInput)]
        embedded = {key: image.embeddings.to(device.current()) for key, image in distinct.items() if isinstance(image, ImageFeatures)}
        if pixels:
            embedded |= dict(zip([image.key for image in pixels], self._encode(policy, pixels), strict=True))
        return torch.cat([embedded[key] for key in micro.image_keys])

    # ------------------------------------------------------------------ forward

    def _forward(self, policy: Any, micro: MicroBatch, images: Images) -> torch.Tensor:
        layout = policy.layout(micro.token_rows, grids_by_row(micro, images))
        return policy(micro.tokens.to(device.current()), layout, self._image_features(policy, micro, images))

    def _logprobs(self, policy: Any, micro: MicroBatch, hidden: torch.Tensor, entropy_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return token_logprobs(
            policy,
            hidden[micro.hidden_index.to(hidden.device)],
            micro.targets.to(hidden.device),
            temperature=self.plan.temperature,
            banned_ids=self.architecture.banned_token_ids,
            with_entropy_grad=entropy_grad,
        )

    def _micro_batches(self, batch: Batch) -> list[list[int]]:
        return micro_batches(batch.total_lengths(), self.plan.max_tokens_per_micro_batch, self.plan.max_samples_per_micro_batch)

    def logprobs(self, batch: Batch, images: Images) -> dict[int, torch.Tensor]:
        return self._all_logprobs(self.policy, batch, images)

    def ref_logprobs(self, batch: Batch, images: Images) -> dict[int, torch.Tensor]:
        if self.reference is None:
            raise ValueError("reference log-probs were asked for, but the engine was built without a reference (init_kl_coef is 0)")
        return self._all_logprobs(self.reference, batch, images)

    @torch.no_grad()
    def _all_logprobs(self, policy: Any, batch: Batch, images: Images) -> dict[int, torch.Tensor]:
        answer: dict[int, torch.Tensor] = {}
        for rows in self._micro_batches(batch):
            micro = pack(batch, rows)
            logprobs, _ = self._logprobs(policy, micro, self._forward(policy, micro, images), entropy_grad=False)
            answer |= dict(zip(micro.batch.sample_ids, logprobs.cpu().split(micro.response_lengths), strict=True))
        return answer

    # ------------------------------------------------------------------ update

    def update(self, request: UpdateRequest, images: Images, policy_loss: PolicyLoss) -> dict[str, float]:
        """Raises RuntimeError, before the optimizer step, when trainer and rollout engine disagree by more than the bound."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        micros = self._in_step(request)
        gaps: list[torch.Tensor] = []
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        collected = get_forward_backward_func()(
            forward_step_func=partial(self._training_step, request=request, images=images, policy_loss=policy_loss, gaps=gaps),
            data_iterator=iter(micros),
            model=self.model,
            num_microbatches=len(micros),
            seq_length=self.plan.max_tokens_per_micro_batch,
            micro_batch_size=1,
            forward_only=False,
        )
        metrics = process_groups.data_parallel_sum({name: sum(float(part[name]) for part in collected) for name in collected[0]})
        metrics |= self._checked_gap(gaps, request)
        self.schedule.step(1)
        succeeded, grad_norm, _ = self.optimizer.step()
        if not succeeded:
            raise RuntimeError(f"the optimizer skipped a step: the gradient is not finite (norm {grad_norm})")
        return metrics | {"grad_norm": float(grad_norm), "lr": float(self.optimizer.param_groups[0]["lr"])}

    def _in_step(self, request: UpdateRequest) -> list[MicroBatch]:
        """Every data-parallel rank runs the same number of micro-batches; a short rank runs a sample without weight."""
        share = request.batch.select(request.rows)
        micros = [pack(share, rows) for rows in self._micro_batches(share)]
        rounds = int(process_groups.data_parallel_max(len(micros)))
        return micros + [pack(masked(request.batch), [0])] * (rounds - len(micros))

    def _training_step(
        self,
        micros: Iterator[MicroBatch],
        model: Any,
        request: UpdateRequest,
        images: Images,
        policy_loss: PolicyLoss,
        gaps: list[torch.Tensor],
    ) -> tuple[torch.Tensor, Any]:
        micro = next(micros)
        hidden = self._forward(self.policy, micro, images)

        def loss_of(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            logprobs, entropy = self._logprobs(self.policy, micro, hidden, entropy_grad=self.entropy_bonus)
            inputs = _loss_input(micro, logprobs, entropy, request)
            gaps.append(((inputs.old_logprobs - inputs.rollout_logprobs).abs() * inputs.loss_mask).detach())
            loss, metrics = policy_loss(inputs)
            # The token count is unused (see _finish_config); megatron asks for an int tensor.
            return loss, torch.ones((), dtype=torch.int, device=loss.device), {k: v.detach() for k, v in metrics.items()}

        return hidden, loss_of

    def _checked_gap(self, gaps: list[torch.Tensor], request: UpdateRequest) -> dict[str, float]:
        values = torch.cat(gaps)
        mean = process_groups.data_parallel_sum({"sum": float(values.sum())})["sum"] / request.num_loss_tokens
        largest = process_groups.data_parallel_max(float(values.max()))
        bound = self.plan.logprob_gap_bound
        if bound and not largest <= bound:
            raise RuntimeError(
                f"trainer and rollout engine disagree: the largest log-prob gap of this mini-batch is {largest:.4g}, "
                f"rl_config.logprob_gap_bound is {bound:g}; nothing was updated. "
                "Look for weights that were not pushed, a cache that was not dropped, another dtype, or another temperature on one side"
            )
        return {"logprob_gap_mean": mean, "logprob_gap_max": largest}

    # ------------------------------------------------------------------ weights

    def publish_weights(self) -> WeightHandle:
        """Rewrites the shared buffer; every reader of the last handle must have returned."""
        parts = PARTS if self.publish_vision else ("text",)
        tensors = list(to_hf(self.policy.weights(), self.architecture.raw, parts))
        if self.buffer is None:
            self.buffer = HostBuffer([(name, tensor.shape, tensor.dtype) for name, tensor in tensors])
        return self.buffer.write(tensors)

    def save(self, folder: Path) -> None:
        saves.save(folder, self.policy, self.optimizer, self.schedule)

    def load(self, folder: Path) -> None:
        """Resumes from a save's `actor` folder, as far as no_load_optim and no_load_rng let it."""
        optimizer = None if self.plan.no_load_optim else self.optimizer
        saves.load(folder, self.policy, optimizer, self.schedule, with_rng=not self.plan.no_load_rng)
        if optimizer is None:
            # In bfloat16 it trains float32 copies of its own, and would put the weights from before back.
            self.optimizer.reload_model_params()


def _num_patches(image: ImageInput) -> int:
    time, height, width = image.grid_thw
    return time * height * width


def _loss_input(micro: MicroBatch, logprobs: torch.Tensor, entropy: torch.Tensor, request: UpdateRequest) -> LossInput:
    batch = micro.batch

    def column(ragged: Any) -> torch.Tensor:
        return ragged.values.to(logprobs.device)

    return LossInput(
        logprobs=logprobs,
        entropy=entropy,
        # On-policy: one update per rollout, so the old policy is the current one, detached.
        old_logprobs=logprobs.detach() if batch.old_logprobs is None else column(batch.old_logprobs),
        rollout_logprobs=column(batch.rollout_logprobs),
        ref_logprobs=None if batch.ref_logprobs is None else column(batch.ref_logprobs),
        advantages=column(batch.advantages),
        loss_mask=column(batch.loss_mask),
        sequence_index=micro.sequence_index.to(logprobs.device),
        num_loss_tokens=request.num_loss_tokens,
        num_sequences=request.num_sequences,
    )
