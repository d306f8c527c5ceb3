"""Vision workers on the actor's devices, and the actor whose trained vision encoder they hold.

trained    pixels --encode--> features --> actor: gradients --by features--> backward --norms of both--> step of both
"""

from __future__ import annotations

import math
from typing import Any

import torch

from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.engines.base import PolicyLoss
from mindspeed_mm_rl.types import Batch, ImageInput
from mindspeed_mm_rl.workers import encoding, placement
from mindspeed_mm_rl.workers.calls import Call, answers
from mindspeed_mm_rl.workers.encoding import EncodedTables
from mindspeed_mm_rl.workers.group import ActorGroup, TrainGroup
from mindspeed_mm_rl.workers.published import Published, publish
from mindspeed_mm_rl.workers.vision import TrainedVisionWorker, VisionWorker
from mindspeed_mm_rl.workers.worker import fetched


class VisionGroup(TrainGroup):
    """Copies of the encoder, each on as many processes as share its layers. Pictures go to copies, balanced by patches."""

    role, name = "vision rank", "vision workers"

    def __init__(self, slots: placement.Slots, plan: Plan) -> None:
        super().__init__(slots, plan, VisionWorker, plan.vision)

    def encode(self, images: dict[str, ImageInput]) -> EncodedTables:
        self.turns.take("image_embeds", self)
        return encoding.encode(self.members, self.train, images, self.timeout)


class TrainedVisionGroup(VisionGroup):
    def __init__(self, slots: placement.Slots, plan: Plan) -> None:
        TrainGroup.__init__(self, slots, plan, TrainedVisionWorker, plan.vision, with_reference=plan.needs_reference)

    def ref_encode(self, images: dict[str, ImageInput]) -> EncodedTables:
        self.turns.take("image_embeds", self)
        return encoding.encode(self.members, self.train, images, self.timeout, verb="ref_encode")

    def backward(self, images: dict[str, ImageInput], gradients: list[Any]) -> float:
        """gradients: object refs of tables by picture, in an order that is the same in every run. Returns the norm of the weights'."""
        copies = encoding.replicas(self.members, self.train)
        shares = [{key: images[key] for key in keys} for keys in encoding.dealt(images, len(copies))]
        pairs = [(member, share) for copy, share in zip(copies, shares, strict=True) for member in copy]
        calls = [Call(member, member.actor.backward.remote(share, gradients), f"{len(share)} pictures") for member, share in pairs]
        return answers(calls, self.timeout, "backward pass of the vision encoder")[0]

    def step(self, grad_norm: float) -> None:
        self._all("update of the vision encoder", lambda worker, _: worker.step.remote(grad_norm))


class ActorBesideVision(ActorGroup):
    """The same verbs where pictures come as pixels and the encoder is trained elsewhere: one update of both together."""

    def __init__(self, slots: placement.Slots, plan: Plan, with_reference: bool, vision: TrainedVisionGroup) -> None:
        super().__init__(slots, plan, with_reference)
        self.vision = vision

    def logprobs(self, batch: Batch, images: list[Any]) -> dict[int, torch.Tensor]:
        return super().logprobs(batch, self.vision.encode(pixels_of(batch, images)).tables())

    def ref_logprobs(self, batch: Batch, images: list[Any]) -> dict[int, torch.Tensor]:
        return super().ref_logprobs(batch, self.vision.ref_encode(pixels_of(batch, images)).tables())

    def update(self, batch: Batch, images: list[Any], policy_loss: PolicyLoss) -> dict[str, float]:
        pixels = pixels_of(batch, images)
        features = self.vision.encode(pixels).tables()
        # Together to the end: gradients of the one are there while the other's are made.
        self.turns.take("update", self, self.vision)
        metrics, gradients = self.gradients(batch, features, policy_loss)
        # As if both were one network: neither knows what the other's gradient is.
        norm = math.hypot(metrics["grad_norm"], self.vision.backward(pixels, gradients))
        self.vision.step(norm)
        return metrics | self.step(norm)

    def publish_weights(self) -> Published:
        return publish(self.carrier, self, self.vision)


def pixels_of(batch: Batch, images: list[Any]) -> dict[str, ImageInput]:
    """The distinct pictures of a batch, mapped from the object store. images: object refs of tables of pixels."""
    wanted = {key for keys in batch.image_keys for key in keys}
    return {key: image for key, image in sorted(fetched(images).items()) if key in wanted} if wanted else {}
