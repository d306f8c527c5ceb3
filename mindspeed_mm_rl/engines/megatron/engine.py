"""The train engine: a policy, its reference, and the log-probs of response tokens under both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from mindspeed_mm_rl.config.plan import TrainPlan
from mindspeed_mm_rl.engines.base import PolicyLoss, UpdateRequest
from mindspeed_mm_rl.engines.megatron import process_groups
from mindspeed_mm_rl.engines.megatron.micro_batch import MicroBatch
from mindspeed_mm_rl.engines.megatron.network import new_networks
from mindspeed_mm_rl.engines.megatron.optimizer import ready_gradients
from mindspeed_mm_rl.engines.megatron.publishing import PublishingEngine
from mindspeed_mm_rl.models.families import read_architecture
from mindspeed_mm_rl.models.heads import token_logprobs
from mindspeed_mm_rl.models.names import PARTS, Entry
from mindspeed_mm_rl.models.placement import Piece
from mindspeed_mm_rl.models.qwen2_5_vl import Policy
from mindspeed_mm_rl.models.rank_pieces import chunk_pieces, grid_entries, read_pieces
from mindspeed_mm_rl.models.weight_sources import source_of
from mindspeed_mm_rl.platforms import device
from mindspeed_mm_rl.types import Batch, ImageFeatures, ImageInput, Images, LossInput


class MegatronTrainEngine(PublishingEngine):
    def __init__(self, plan: TrainPlan, with_reference: bool, entropy_bonus: bool, publish_vision: bool) -> None:
        """Needs process_groups.initialize first. publish_vision: whether the rollout engine runs a vision encoder of its own."""
        super().__init__(plan, _new_policies(plan, plan.load))
        self.references = [network.requires_grad_(False) for network in _new_policies(plan, plan.reference_load)] if with_reference else []
        if self.references and self.vision_is_frozen:
            self._check_shared_vision(self.references[0])
        self.entropy_bonus = entropy_bonus
        self.publish_vision = publish_vision

    def _check_shared_vision(self, reference: Policy) -> None:
        """A frozen vision encoder runs once for policy and reference, so it must be the same in both."""
        others = reference.weights()
        for name, parameter in self.networks[0].weights().items():
            if name.startswith("image_encoder.") and not torch.equal(parameter, others[name]):
                raise ValueError(
                    f"the vision encoder is frozen, but {name} of the reference ({self.plan.reference_load}, {self.plan.reference_key}) "
                    f"differs from that of actor_config.load ({self.plan.load}): give a reference with the same vision "
                    "encoder, or set freeze: false in the model file"
                )

    def encode(self, images: dict[str, ImageInput]) -> dict[str, ImageFeatures]:
        """Every picture through the frozen vision encoder once."""
        self.state.hold("param")
        return self._encoder().features(self.networks[0], images)

    @property
    def policy(self) -> Policy:
        return self.network

    def _head(self, policy: Policy, hidden: torch.Tensor, targets: torch.Tensor, entropy_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return token_logprobs(
            policy,
            hidden,
            targets,
            temperature=self.plan.temperature,
            banned_ids=self.architecture.banned_token_ids if self.plan.bans_markers else (),
            with_entropy_grad=entropy_grad,
        )

    def logprobs(self, batch: Batch, rows: Sequence[int], images: Images) -> dict[int, torch.Tensor]:
        return self._by_sample(self.networks, partial(self._head, entropy_grad=False), batch, rows, images)

    def ref_logprobs(self, batch: Batch, rows: Sequence[int], images: Images) -> dict[int, torch.Tensor]:
        if not self.references:
            raise ValueError("reference log-probs were asked for, but the engine was built without a reference")
        return self._by_sample(self.references, partial(self._head, entropy_grad=False), batch, rows, images)

    def update(self, request: UpdateRequest, images: Images, policy_loss: PolicyLoss) -> dict[str, float]:
        """Raises RuntimeError, before the optimizer step, when trainer and rollout engine disagree by more than the bound."""
        return self._agreed_gradients(request, images, policy_loss) | self._step()

    def gradients(
        self, request: UpdateRequest, images: dict[str, ImageFeatures], policy_loss: PolicyLoss
    ) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        """`update` without its last part, `step`: this network's share of the gradient norm is among the metrics.

        Also the gradient by the features of each picture that this rank saw, float32, where it has the first stage.
        """
        seen = {key for row in (0, *request.rows) for key in request.batch.image_keys[row]}
        leaves = {key: _as_leaf(images[key]) for key in sorted(seen)}
        metrics = self._agreed_gradients(request, leaves, policy_loss) | {"grad_norm": ready_gradients(self.optimizer)}
        found = {key: leaf.embeddings.grad for key, leaf in leaves.items()}
        return metrics, {key: gradient.cpu() for key, gradient in found.items() if gradient is not None}

    def _agreed_gradients(self, request: UpdateRequest, images: Images, policy_loss: PolicyLoss) -> dict[str, float]:
        gaps: list[torch.Tensor] = []
        head = partial(self._head, entropy_grad=self.entropy_bonus)
        metrics = self._gradients(request, images, head, partial(self._loss, request=request, policy_loss=policy_loss, gaps=gaps))
        return metrics | self._checked_gap(gaps, request)

    def _loss(
        self,
        micro: MicroBatch,
        logprobs: torch.Tensor,
        entropy: torch.Tensor,
        request: UpdateRequest,
        policy_loss: PolicyLoss,
        gaps: list[torch.Tensor],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        inputs = _loss_input(micro, logprobs, entropy, request)
        gaps.append(((inputs.old_logprobs - inputs.rollout_logprobs).abs() * inputs.loss_mask).detach())
        return policy_loss(inputs)

    def _checked_gap(self, gaps: list[torch.Tensor], request: UpdateRequest) -> dict[str, float]:
        """Known on the last stage, and judged on all, so that no rank steps alone."""
        total = largest = 0.0
        if gaps:
            values = torch.cat(gaps)
            total, largest = process_groups.data_parallel_sum({"sum": float(values.sum())})["sum"], float(values.max())
        mean, largest = process_groups.world_max([total / request.num_loss_tokens, largest])
        if math.isinf(largest):
            # NaN, too; a gradient that isn't finite, which NaN of the trainer's would have made, has been refused before.
            raise RuntimeError(
                "log-probs of the rollout engine are not finite; nothing was updated. Look for weights that were pushed half, or a kernel "
                "of the rollout engine that overflows"
            )
        bound = self.plan.logprob_gap_bound
        if bound and not largest <= bound:
            raise RuntimeError(
                f"trainer and rollout engine disagree: the largest log-prob gap of this mini-batch is {largest:.4g}, "
                f"rl_config.logprob_gap_bound is {bound:g}; nothing was updated. "
                "Look for weights that were not pushed, a cache that was not dropped, another dtype, or another temperature on one side"
            )
        return {"logprob_gap_mean": mean, "logprob_gap_max": largest}

    def published(self) -> tuple[list[tuple[Piece, ...]], list[Entry]]:
        grid, place = process_groups.grid(self.plan, self.architecture.text.num_layers), process_groups.grid_place()
        parts = PARTS if self.publish_vision else ("text",)
        table = [entry for entry in grid_entries(self.architecture.raw, grid, self.plan.with_vision) if entry.part in parts]
        return [chunk_pieces(table, grid, place, virtual) for virtual in range(grid.virtual)], table


def _new_policies(plan: TrainPlan, weights: str) -> list[Policy]:
    architecture = read_architecture(plan.hf_path)
    parts = PARTS if plan.with_vision else ("text",)
    reader = partial(read_pieces, source_of(weights, architecture.raw, parts))
    return new_networks(Policy, architecture, plan, architecture.raw, reader)


def _as_leaf(image: ImageFeatures) -> ImageFeatures:
    """Float32, so that the gradients of many micro-batches add up."""
    return ImageFeatures(image.embeddings.to(device.current(), torch.float32, copy=True).requires_grad_(), image.grid_thw)


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
