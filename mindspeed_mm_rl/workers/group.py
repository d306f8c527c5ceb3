"""The trainer's and the rollout engine's processes as two objects that the driver talks to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.data.packing import balanced_shares
from mindspeed_mm_rl.engines.base import PolicyLoss
from mindspeed_mm_rl.engines.vllm.environment import rollout_env
from mindspeed_mm_rl.types import Batch, ImageInput, RolloutGroup, RolloutRequest
from mindspeed_mm_rl.weights.host import WeightHandle
from mindspeed_mm_rl.workers import placement
from mindspeed_mm_rl.workers.actor import ActorWorker
from mindspeed_mm_rl.workers.rollout import RolloutWorker


class WorkerFailed(RuntimeError):
    """A worker process raised, died, or was silent for too long; the message says which and why."""


@contextmanager
def _told(what: str, timeout_seconds: float) -> Iterator[None]:
    """Turns what Ray raises for a worker into one sentence."""
    import ray

    try:
        yield
    except ray.exceptions.GetTimeoutError as error:
        raise WorkerFailed(f"{what} did not answer within {timeout_seconds:.0f} s (rl_config.timeout_seconds)") from error
    except ray.exceptions.RayTaskError as error:
        raise WorkerFailed(f"{what} failed: {error.cause}") from error
    except ray.exceptions.RayActorError as error:
        raise WorkerFailed(f"{what}: the worker process died ({error})") from error


def _answers(refs: list[Any], timeout_seconds: float, what: str) -> list[Any]:
    """Waits for all; raises WorkerFailed that says what was waited for."""
    import ray

    with _told(what, timeout_seconds):
        return ray.get(refs, timeout=timeout_seconds)


class ActorGroup:
    """All ranks of the trainer. Rows of a batch go to data-parallel ranks by whole groups, balanced by tokens."""

    def __init__(self, slots: placement.Slots, plan: Plan, with_reference: bool) -> None:
        address = placement.free_address()
        self.timeout = plan.run.timeout_seconds
        variables = dict(plan.runtime_env) | {"OMP_NUM_THREADS": str(plan.train.threads)}
        self.workers = [
            placement.spawn(
                slots, ActorWorker, rank, variables, plan=plan.train, rank=rank, world_size=slots.count, address=address,
                with_reference=with_reference, entropy_bonus=plan.recipe.entropy_coeff != 0, publish_vision=not plan.rollout.image_embeds,
            )
            for rank in range(slots.count)
        ]  # fmt: skip

    def ready(self) -> int:
        return self._all("start of the trainer", lambda worker, _: worker.ready.remote())[0]

    def encode(self, images: dict[str, ImageInput]) -> list[Any]:
        """Every picture once, shared out over the ranks; object refs of the encoded tables, finished, which the driver never holds."""
        keys = list(images)
        shares = balanced_shares([math.prod(images[key].grid_thw) for key in keys], len(self.workers))
        tables = [{keys[i]: images[keys[i]] for i in share} for share in shares if share]
        pairs = [worker.encode.options(num_returns=2).remote(table) for worker, table in zip(self.workers, tables, strict=False)]
        # The count says that the table is there, or why not, without bringing it here.
        _answers([count for _, count in pairs], self.timeout, "trainer (vision encoder)")
        return [table for table, _ in pairs]

    def logprobs(self, batch: Batch, images: list[Any]) -> dict[int, torch.Tensor]:
        return self._by_sample("log-probs", "logprobs", batch, images)

    def ref_logprobs(self, batch: Batch, images: list[Any]) -> dict[int, torch.Tensor]:
        return self._by_sample("reference log-probs", "ref_logprobs", batch, images)

    def update(self, batch: Batch, images: list[Any], policy_loss: PolicyLoss) -> dict[str, float]:
        import ray

        shares, ref = self._shares(batch), ray.put(batch)
        totals = (float(batch.loss_mask.values.sum()), float(len(batch)))
        answers = self._all("update", lambda worker, rank: worker.update.remote(ref, shares[rank], images, policy_loss, *totals))
        return answers[0]

    def publish_weights(self) -> WeightHandle:
        """Data-parallel ranks hold the same weights, so the first one writes them."""
        return _answers([self.workers[0].publish_weights.remote()], self.timeout, "trainer (weight push)")[0]

    def save(self, folder: str) -> None:
        self._all("save", lambda worker, _: worker.save.remote(folder))

    def load(self, folder: str) -> None:
        self._all("load", lambda worker, _: worker.load.remote(folder))

    def peak_memory(self) -> int:
        return sum(self._all("memory report", lambda worker, _: worker.peak_memory.remote()))

    def _all(self, what: str, call: Callable[[Any, int], Any]) -> list[Any]:
        return _answers([call(worker, rank) for rank, worker in enumerate(self.workers)], self.timeout, f"trainer ({what})")

    def _by_sample(self, what: str, verb: str, batch: Batch, images: list[Any]) -> dict[int, torch.Tensor]:
        import ray

        shares, ref = self._shares(batch), ray.put(batch)
        answers = self._all(what, lambda worker, rank: getattr(worker, verb).remote(ref, shares[rank], images))
        return {sample_id: values for answer in answers for sample_id, values in answer.items()}

    def _shares(self, batch: Batch) -> list[list[int]]:
        n = batch.samples_per_prompt
        lengths = batch.total_lengths()
        weights = [sum(lengths[start : start + n]) for start in range(0, len(batch), n)]
        return [[group * n + k for group in share for k in range(n)] for share in balanced_shares(weights, len(self.workers))]


class RolloutGroupStream:
    """All rollout replicas. Prompts are dealt in turn; finished groups are merged as they come."""

    def __init__(self, slots: placement.Slots, plan: Plan) -> None:
        self.timeout = plan.run.timeout_seconds
        self.num_samples = plan.run.samples_per_prompt
        variables = dict(plan.runtime_env) | rollout_env(plan.rollout.threads)
        self.workers = [
            placement.spawn(slots, RolloutWorker, slot, variables, plan=plan.rollout, seed=plan.rollout.seed)
            for slot in range(0, slots.count, plan.rollout.tensor_parallel_size)
        ]

    def ready(self) -> None:
        _answers([worker.ready.remote() for worker in self.workers], self.timeout, "start of the rollout engine")

    def generate(self, requests: list[RolloutRequest], images: list[Any]) -> Iterator[RolloutGroup]:
        """Yields groups in finish order. Raises WorkerFailed, naming prompts, when nothing finishes within the bound."""
        import ray

        waiting = {request.prompt_id for request in requests}
        shares = [requests[i :: len(self.workers)] for i in range(len(self.workers))]
        streams = [
            worker.generate.options(num_returns="streaming").remote(share, images, self.num_samples)
            for worker, share in zip(self.workers, shares, strict=True)
            if share
        ]
        while streams:
            done, _ = ray.wait(streams, num_returns=1, timeout=self.timeout)
            if not done:
                raise WorkerFailed(
                    f"rollout: no group finished within {self.timeout:.0f} s (rl_config.timeout_seconds); "
                    f"{len(waiting)} prompts are unfinished, such as {sorted(waiting)[:5]}"
                )
            for stream in done:
                ref = next(stream, None)
                if ref is None:
                    streams.remove(stream)
                    continue
                with _told("rollout", self.timeout):
                    group = ray.get(ref)
                waiting.discard(group.prompt_id)
                yield group
        if waiting:
            raise WorkerFailed(f"rollout: the streams ended without prompts {sorted(waiting)[:5]} ({len(waiting)} in all)")

    def receive_weights(self, handle: WeightHandle, policy_version: int) -> None:
        _answers(
            [worker.receive_weights.remote(handle, policy_version) for worker in self.workers], self.timeout, "rollout engine (weight push)"
        )

    def peak_memory(self) -> int:
        return sum(_answers([worker.peak_memory.remote() for worker in self.workers], self.timeout, "rollout engine (memory report)"))
