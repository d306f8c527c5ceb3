"""The train engine: a policy, its reference, and the log-probs of response tokens under both."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from mindspeed_mm_rl.config.plan import TrainPlan
from mindspeed_mm_rl.data.packing import micro_batches
from mindspeed_mm_rl.engines.base import PolicyLoss, UpdateRequest
from mindspeed_mm_rl.engines.megatron import process_groups
from mindspeed_mm_rl.engines.megatron.micro_batch import MicroBatch
from mindspeed_mm_rl.engines.megatron.network import NetworkEngine, new_network
from mindspeed_mm_rl.models.families import read_architecture
from mindspeed_mm_rl.models.heads import token_logprobs
from mindspeed_mm_rl.models.names import PARTS
from mindspeed_mm_rl.models.qwen2_5_vl import Policy
from mindspeed_mm_rl.models.weight_files import read_megatron_weights
from mindspeed_mm_rl.models.weight_layout import to_hf
from mindspeed_mm_rl.types import Batch, ImageFeatures, ImageInput, Images, LossInput
from mindspeed_mm_rl.weights.host import HostBuffer, WeightHandle

_PATCHES_PER_ENCODE = 16384
"""Patches that one pass of the frozen vision encoder takes: bounds its activations, not its result."""


class MegatronTrainEngine(NetworkEngine):
    def __init__(self, plan: TrainPlan, with_reference: bool, entropy_bonus: bool, publish_vision: bool) -> None:
        """Needs process_groups.initialize first. publish_vision: whether the rollout engine runs a vision encoder of its own."""
        super().__init__(plan, _new_policy(plan, plan.load))
        self.policy: Policy = self.network
        self.reference = _new_policy(plan, plan.reference_load).requires_grad_(False) if with_reference else None
        if self.reference is not None and self.vision_is_frozen:
            self._check_shared_vision(self.reference)
        self.entropy_bonus = entropy_bonus
        self.publish_vision = publish_vision
        self.buffer: HostBuffer | None = None

    def _check_shared_vision(self, reference: Policy) -> None:
        """A frozen vision encoder runs once for policy and reference, so it must be the same in both."""
        others = reference.weights()
        for name, parameter in self.policy.weights().items():
            if name.startswith("image_encoder.") and not torch.equal(parameter, others[name]):
                raise ValueError(
                    f"the vision encoder is frozen, but {name} of the reference ({self.plan.reference_load}, "
                    f"rl_config.integrated_mode_config.ref_model_load_path) differs from that of actor_config.load ({self.plan.load}): "
                    "give a reference with the same vision encoder, or set freeze: false in the model file"
                )

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

    def _logprobs(self, policy: Policy, micro: MicroBatch, hidden: torch.Tensor, entropy_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return token_logprobs(
            policy,
            hidden[micro.hidden_index.to(hidden.device)],
            micro.targets.to(hidden.device),
            temperature=self.plan.temperature,
            banned_ids=self.architecture.banned_token_ids,
            with_entropy_grad=entropy_grad,
        )

    def logprobs(self, batch: Batch, images: Images) -> dict[int, torch.Tensor]:
        return self._all_logprobs(self.policy, batch, images)

    def ref_logprobs(self, batch: Batch, images: Images) -> dict[int, torch.Tensor]:
        if self.reference is None:
            raise ValueError("reference log-probs were asked for, but the engine was built without a reference (init_kl_coef is 0)")
        return self._all_logprobs(self.reference, batch, images)

    def _all_logprobs(self, policy: Policy, batch: Batch, images: Images) -> dict[int, torch.Tensor]:
        def head(micro: MicroBatch, hidden: torch.Tensor) -> torch.Tensor:
            return self._logprobs(policy, micro, hidden, entropy_grad=False)[0]

        return self._by_sample(policy, head, batch, images)

    def update(self, request: UpdateRequest, images: Images, policy_loss: PolicyLoss) -> dict[str, float]:
        """Raises RuntimeError, before the optimizer step, when trainer and rollout engine disagree by more than the bound."""
        gaps: list[torch.Tensor] = []
        metrics = self._gradients(request, images, partial(self._loss, request=request, policy_loss=policy_loss, gaps=gaps))
        return metrics | self._checked_gap(gaps, request) | self._step()

    def _loss(
        self, micro: MicroBatch, hidden: torch.Tensor, request: UpdateRequest, policy_loss: PolicyLoss, gaps: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logprobs, entropy = self._logprobs(self.policy, micro, hidden, entropy_grad=self.entropy_bonus)
        inputs = _loss_input(micro, logprobs, entropy, request)
        gaps.append(((inputs.old_logprobs - inputs.rollout_logprobs).abs() * inputs.loss_mask).detach())
        return policy_loss(inputs)

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

    def publish_weights(self) -> WeightHandle:
        """Rewrites the shared buffer; every reader of the last handle must have returned."""
        parts = PARTS if self.publish_vision else ("text",)
        tensors = list(to_hf(self.policy.weights(), self.architecture.raw, parts))
        if self.buffer is None:
            self.buffer = HostBuffer([(name, tensor.shape, tensor.dtype) for name, tensor in tensors])
        return self.buffer.write(tensors)


def _new_policy(plan: TrainPlan, weights: str) -> Policy:
    architecture = read_architecture(plan.hf_path)
    return new_network(Policy, architecture, plan, read_megatron_weights(weights, architecture.raw))


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
