"""vLLM cannot spread experts over processes on CPU: its kernels take the numbers of all experts for places in the weights of their own, and
its communicator has no collectives over unequal numbers of tokens.

tokens of all --all_gatherv--> a process adds up its own experts for them --reduce_scatterv--> every process has the sums of its tokens
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mindspeed_mm_rl.platforms.patching import Patch

if TYPE_CHECKING:
    import torch


class OwnExperts:
    """Goes before a class of expert kernels."""

    def apply(self, *, topk_weights: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor | None, **others: Any) -> None:
        """topk_*: [T, k]; expert_map: [E], places of the experts of this process, -1 for the others; None where it has them all."""
        if expert_map is not None:
            places = expert_map[topk_ids.long()]
            topk_weights, topk_ids = topk_weights * (places >= 0), places.clamp(min=0).to(topk_ids.dtype)
        super().apply(topk_weights=topk_weights, topk_ids=topk_ids, expert_map=None, **others)


def _all_gatherv(
    self: Any, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: list[int] | None = None
) -> torch.Tensor | list[torch.Tensor]:
    """sizes: rows of each process; None: all have as many. Gathers along dimension 0, whatever `dim` says."""
    import torch

    if isinstance(input_, list):
        return [_all_gatherv(self, tensor, dim, sizes) for tensor in input_]
    sizes = sizes or [len(input_)] * self.world_size
    padded = torch.nn.functional.pad(input_, (0, 0) * (input_.dim() - 1) + (0, max(sizes) - len(input_)))
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded.contiguous(), group=self.device_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _reduce_scatterv(self: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None) -> torch.Tensor:
    """The inverse of _all_gatherv, with sums."""
    import torch

    total = input_.contiguous().clone()
    torch.distributed.all_reduce(total, group=self.device_group)
    return total.split(sizes or len(total) // self.world_size)[self.rank_in_group].clone()


def _apply() -> None:
    import functools

    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    begin = UnquantizedFusedMoEMethod.__init__

    @functools.wraps(begin)
    def begin_with_own_experts(self: Any, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        self.experts_cls = type(f"Own{self.experts_cls.__name__}", (OwnExperts, self.experts_cls), {})

    UnquantizedFusedMoEMethod.__init__ = begin_with_own_experts
    CpuCommunicator.all_gatherv, CpuCommunicator.reduce_scatterv = _all_gatherv, _reduce_scatterv


PATCH = Patch(
    package="vllm",
    versions=">=0.32",
    process="rollout",
    devices=("cpu",),
    changes=(
        "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method.UnquantizedFusedMoEMethod.__init__",
        "vllm.distributed.device_communicators.cpu_communicator.CpuCommunicator.all_gatherv",
        "vllm.distributed.device_communicators.cpu_communicator.CpuCommunicator.reduce_scatterv",
    ),
    until="vLLM runs experts of several processes on CPU",
    apply=_apply,
)
