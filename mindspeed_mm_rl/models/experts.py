"""Mixture of experts: megatron's layer, which sends tokens to the ranks of their experts and back, around a router of this package.

hidden [T, 1, hidden] --Router--> weights and choice [T, experts] --all to all--> LocalExperts --all to all--> sum
                      '--SharedExperts (every token)-----------------------------------------------------> + --> [T, 1, hidden]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from mindspeed_mm_rl.models.families import Experts
from mindspeed_mm_rl.models.mlp import LINEARS, GatedMLP
from mindspeed_mm_rl.platforms import device

_BEST_OF_GROUP = 2
_SMALLEST_SUM = 1e-20
"""Added to the sum of weights, as DeepSeek does: sigmoids may all be 0."""


class Router(MegatronModule):
    """Which experts a token goes to, and with which weights; in float32, as a rounded score changes the choice.

    Megatron's own always divides sigmoid weights by their sum, counts other experts of a group than DeepSeek does, and moves the bias
    by load, which would change the policy behind the loss's back.
    """

    def __init__(self, config: TransformerConfig, experts: Experts) -> None:
        super().__init__(config=config)
        self.experts = experts
        self.weight = torch.nn.Parameter(torch.empty(experts.count, config.hidden_size, device=device.current(), dtype=config.params_dtype))
        config.init_method(self.weight)
        # Megatron sums the gradients of so marked parameters over the tensor-parallel ranks, each of which sees some tokens only.
        self.weight.sequence_parallel = config.sequence_parallel
        self.expert_bias = None
        if experts.score_function == "sigmoid":
            bias = torch.zeros(experts.count, device=device.current(), dtype=torch.float32)
            self.expert_bias = torch.nn.Parameter(bias, requires_grad=False)

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron counts the loads of its own router by it."""

    def forward(self, hidden: torch.Tensor, padding_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., hidden] -> weights, float32 [T, experts], 0 but for the chosen experts; which are chosen, bool [T, experts]."""
        logits = F.linear(hidden.flatten(0, -2).float(), self.weight.float())
        chosen, weights = route(logits, self.experts, self.expert_bias)
        everywhere = torch.zeros_like(logits)
        return everywhere.scatter(1, chosen, weights), everywhere.bool().scatter(1, chosen, True)


def route(logits: torch.Tensor, experts: Experts, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers and weights, [T, per_token], of each token's experts; logits float32 [T, experts]."""
    scores = logits.softmax(-1) if experts.score_function == "softmax" else logits.sigmoid()
    chosen = _best(scores if bias is None else scores + bias, experts)
    weights = scores.gather(1, chosen)
    if experts.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + _SMALLEST_SUM)
    return chosen, weights * experts.routed_scaling_factor


def _best(scores: torch.Tensor, experts: Experts) -> torch.Tensor:
    """Of the best groups (DeepSeek-V3, arXiv:2412.19437, section 2.1.2), the best experts."""
    if experts.topk_group < experts.n_group:
        grouped = scores.unflatten(1, (experts.n_group, -1))
        worth = grouped.topk(_BEST_OF_GROUP, dim=-1).values.sum(-1)
        best = torch.zeros_like(worth, dtype=torch.bool).scatter(1, worth.topk(experts.topk_group).indices, True)
        scores = grouped.masked_fill(~best[..., None], -torch.inf).flatten(1)
    return scores.topk(experts.per_token).indices


class _OwnWeight:
    """A linear layer that gives its weight away. It is called, not read: overlap_param_gather waits for the parameters of a module when the
    module is called."""

    weight: torch.Tensor

    def forward(self) -> torch.Tensor:
        return self.weight


class _Columns(_OwnWeight, ColumnParallelLinear): ...


class _Rows(_OwnWeight, RowParallelLinear): ...


class LocalExperts(SequentialMLP):
    """Megatron's parameters, run through the device's grouped product; saved one by one, under their numbers in the whole layer."""

    def forward(self, tokens: torch.Tensor, counts: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Tokens [T, hidden] of this rank's experts one behind the other, how many each has, the router's weights [T] -> [T, hidden].

        A rank that has a part of every expert returns its part of the sum; megatron's dispatcher adds them up.
        """
        first, second = ([getattr(expert, layer)() for expert in self.local_experts] for layer in ("linear_fc1", "linear_fc2"))
        numbers = counts.tolist()
        inner = device.swiglu(device.grouped_matmul(tokens, first, numbers))
        return device.grouped_matmul((inner * weights[:, None]).to(inner.dtype), second, numbers), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        first = parallel_state.get_expert_model_parallel_rank() * self.num_local_experts
        replica = (0, 0, parallel_state.get_expert_data_parallel_rank())
        state: dict[str, Any] = {}
        for local, expert in enumerate(self.local_experts):
            own = f"{prefix}local_experts.{local}."
            shards = _shards(expert, own, metadata)
            replace_prefix_for_sharding(shards, own, f"{prefix}local_experts.{first + local}.")
            for shard in shards.values():
                shard.replica_id = replica
            state |= shards
        return state


def _shards(expert: MLP, prefix: str, metadata: dict[str, Any] | None) -> dict[str, Any]:
    if parallel_state.get_expert_tensor_parallel_world_size() > 1:
        shards = expert.sharded_state_dict(prefix, (), metadata)
        # Empty, and the same on every tensor-parallel rank.
        return {name: shard for name, shard in shards.items() if not name.endswith("._extra_state")}
    # 0.12 would cut them by the tensor-parallel ranks of other weights.
    return {name: ShardedTensor.from_rank_offsets(name, weight) for name, weight in expert.named_parameters(prefix.removesuffix("."))}


class SharedExperts(SharedExpertMLP, GatedMLP):
    """Megatron's without a gate, which one version of it must be told by the spec and another must not."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **{**named, "gate": False})


class ExpertLayer(MoELayer):
    def __init__(self, config: TransformerConfig, experts: Experts, **named: Any) -> None:
        super().__init__(config=config, **named)
        self.router = Router(config, experts)


def expert_layer_spec(experts: Experts) -> ModuleSpec:
    submodules = MoESubmodules(
        experts=ModuleSpec(module=LocalExperts, submodules=MLPSubmodules(linear_fc1=_Columns, linear_fc2=_Rows)),
        shared_experts=ModuleSpec(module=SharedExperts, submodules=LINEARS),
    )
    return ModuleSpec(module=ExpertLayer, params={"experts": experts}, submodules=submodules)


def expert_settings(experts: Experts) -> dict[str, Any]:
    """Arguments of a TransformerConfig: every token keeps all of its experts, without a loss or a bias that balances their load."""
    return {
        "num_moe_experts": experts.count,
        "moe_router_topk": experts.per_token,
        "moe_ffn_hidden_size": experts.ffn_size,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_size or None,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        # What megatron's own router, which is replaced, would need for any per_token and dtype.
        "moe_router_pre_softmax": True,
        "moe_router_dtype": "fp32",
    }


def check_expert_split(experts: Experts | None, tensor: int, expert: int, expert_tensor: int, sequence_parallel: bool) -> None:
    """Raises ValueError for numbers of processes that megatron's experts can't be shared by, or would be trained wrongly with."""
    if experts is None:
        if expert > 1:
            raise ValueError(f"expert_model_parallel_size ({expert}) must be 1: the model has no experts")
        return
    if experts.count % expert:
        raise ValueError(f"expert_model_parallel_size ({expert}) must divide the model's {experts.count} experts")
    if tensor > 1 and not sequence_parallel:
        raise ValueError(
            f"tensor_model_parallel_size ({tensor}) > 1 of a model with experts needs sequence_parallel: true, or every rank of a group "
            "would send the same tokens to the experts"
        )
    if expert == 1 and expert_tensor != tensor:
        # Megatron takes the experts' gradients for those of any other weight then, and leaves out the other tensor-parallel ranks' tokens.
        raise ValueError(
            f"expert_tensor_parallel_size ({expert_tensor}) must be tensor_model_parallel_size ({tensor}) where "
            "expert_model_parallel_size is 1"
        )
