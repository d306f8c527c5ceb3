"""CPU: gives every CUDA call that megatron-core makes a meaning on the host, without editing megatron-core.

It changes torch for the whole process, so only training workers call it. What is changed, and why nothing less will do:
  runtime    torch.cuda.{current_device, synchronize, Stream, Event, RNG, memory, nvtx}: called unconditionally all over megatron
  factories  device="cuda" written out in torch.zeros(...) and 20 others, Tensor.to, .cuda(), pin_memory
  type names optimizers ask `param.type() == "torch.cuda.FloatTensor"`
  compile    megatron binds torch.compile while it is imported; inductor would then build C++ for each small function
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._device

from mindspeed_mm_rl.platforms import compat
from mindspeed_mm_rl.platforms.packed_sdpa import Segments, packed_sdpa

_CPU = torch.device("cpu")
_DO_NOTHING = ["set_device", "synchronize", "empty_cache", "ipc_collect", "set_stream", "reset_peak_memory_stats", "_lazy_init"]
_ARE_ZERO = ["memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"]
_FACTORIES = [
    "empty",
    "zeros",
    "ones",
    "full",
    "tensor",
    "arange",
    "rand",
    "randn",
    "randint",
    "linspace",
    "eye",
    "as_tensor",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
    "empty_strided",
    "triu_indices",
    "tril_indices",
]


def host_memory(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    return packed_sdpa(query, key, value, segments, causal, scale)


@functools.lru_cache(maxsize=1)
def adapt_megatron() -> None:
    """Imports megatron-core so that it runs on CPU. Call it before anything else imports megatron."""
    # torch caches this list on first use. Filled after the factories are wrapped it breaks `with torch.device("meta")`, and every
    # from_pretrained of transformers in the process then leaves its rotary buffers uninitialised, without an error.
    torch.utils._device._device_constructors()
    _adapt_runtime()
    _adapt_factories()
    _adapt_type_names()
    with _without_compile():
        import megatron.core  # noqa: F401
        from megatron.core.optimizer import distrib_optimizer
        from megatron.core.tensor_parallel import mappings
        from megatron.core.transformer.moe import moe_utils, token_dispatcher
    # The "GPU" generator is the CPU's own here: megatron's warning that the CPU's moved while it drew from the GPU's is always true.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    _adapt_experts(moe_utils, token_dispatcher)
    _adapt_uneven_collectives()
    _adapt_uneven_parts(mappings)
    _adapt_distributed_optimizer(distrib_optimizer.DistributedOptimizer)
    if compat.megatron_is_0_12():
        _repair_0_12(distrib_optimizer)


class _Stream:
    """A stream that is always in order and always finished."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, *_: Any) -> float:
        return 0.0


class _OneGenerator:
    """torch.cuda.default_generators: indexed by the current device, which is torch.device("cpu") here."""

    def __getitem__(self, _: Any) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def _answer(value: Any = None) -> Callable[..., Any]:
    """A new function each time: torch._dynamo refuses one object that is known under two torch names."""
    return lambda *_, **__: value


def _adapt_runtime() -> None:
    stream = _Stream()
    replacements: dict[str, Any] = {name: _answer() for name in _DO_NOTHING} | {name: _answer(0) for name in _ARE_ZERO}
    replacements |= {name: _answer(stream) for name in ("current_stream", "default_stream")}
    replacements |= {
        "current_device": _answer(_CPU),
        "device_count": _answer(1),
        "Stream": _Stream,
        "Event": _Event,
        "ExternalStream": type("ExternalStream", (_Stream,), {}),
        "stream": _answer(contextlib.nullcontext()),
        "device": _answer(contextlib.nullcontext()),
        "is_current_stream_capturing": _answer(False),
        "memory_stats": lambda *_, **__: {},
        "get_device_capability": _answer((8, 0)),
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed) and None,
        "manual_seed_all": lambda seed: torch.default_generator.manual_seed(seed) and None,
        "default_generators": _OneGenerator(),
        "_lazy_call": lambda function, **_: function(),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    torch.cuda.random.get_rng_state = replacements["get_rng_state"]
    torch.cuda.random.set_rng_state = replacements["set_rng_state"]
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _answer())
    torch.cuda.nvtx.range = _answer(contextlib.nullcontext())


def _is_cuda(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


def _to_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(to)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return to(self, *(_CPU if _is_cuda(arg) else arg for arg in args), **kwargs)

    return wrapped


def _itself() -> Callable[..., Any]:
    return lambda self, *_, **__: self


def _adapt_factories() -> None:
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for kind in (torch.Tensor, torch.nn.Module):
        kind.to = _to_cpu(kind.to)
        kind.cuda = _itself()
    torch.Tensor.pin_memory = _itself()
    torch.Tensor.record_stream = _answer()


def _adapt_type_names() -> None:
    name_of = torch.Tensor.type

    @functools.wraps(name_of)
    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = name_of(self, *args, **kwargs)
        if args or kwargs or answer.startswith("torch.cuda."):
            return answer
        return answer.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_name


@contextlib.contextmanager
def _without_compile() -> Iterator[None]:
    compile_ = torch.compile
    torch.compile = lambda model=None, *_, **__: model if callable(model) else (lambda function: function)
    try:
        yield
    finally:
        torch.compile = compile_


def _adapt_experts(*modules: Any) -> None:
    """all_to_all_single wants split sizes as numbers; megatron converts them only when they are CUDA tensors."""

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    for module in modules:
        if "maybe_move_tensor_to_cpu" in vars(module):
            module.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu
        # 0.16 binds this name only where Transformer Engine is installed, and reads it everywhere.
        vars(module).setdefault("te_general_gemm", None)


def _adapt_uneven_parts(mappings: Any) -> None:
    """gloo collects and scatters equal parts only. Processes that share experts and each of them have unequal numbers of tokens; between
    any two of them gloo exchanges what they like."""
    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_any(part: torch.Tensor, group: Any = None, output_split_sizes: Any = None, *rest: Any, **named: Any) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(part, group, output_split_sizes, *rest, **named)
        ranks, sizes = group.size(), [int(size) for size in output_split_sizes]
        whole = part.new_empty((sum(sizes), *part.shape[1:]))
        torch.distributed.all_to_all_single(whole, torch.cat([part] * ranks), sizes, [len(part)] * ranks, group=group)
        return whole

    def reduce_scatter_any(whole: torch.Tensor, group: Any = None, input_split_sizes: Any = None, *rest: Any, **named: Any) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(whole, group, input_split_sizes, *rest, **named)
        ranks, sizes = group.size(), [int(size) for size in input_split_sizes]
        parts = whole.new_empty((ranks * sizes[group.rank()], *whole.shape[1:]))
        torch.distributed.all_to_all_single(parts, whole.contiguous(), [sizes[group.rank()]] * ranks, sizes, group=group)
        return parts.view(ranks, -1, *whole.shape[1:]).sum(0) if len(parts) else parts

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_any, reduce_scatter_any


def _adapt_uneven_collectives() -> None:
    """gloo gathers and scatters parts of one size alone, but the ranks that share an expert bring as many tokens as chose it."""
    all_gather, reduce_scatter = torch.distributed.all_gather, torch.distributed.reduce_scatter

    @functools.wraps(all_gather)
    def gather(parts: list[torch.Tensor], own: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        longest = max(len(part) for part in parts)
        if all(len(part) == longest for part in parts):
            return all_gather(parts, own, group=group, async_op=async_op)
        padded = [part.new_empty(longest, *part.shape[1:]) for part in parts]
        all_gather(padded, torch.cat([own, own.new_zeros(longest - len(own), *own.shape[1:])]), group=group)
        for part, whole in zip(parts, padded, strict=True):
            part.copy_(whole[: len(part)])

    @functools.wraps(reduce_scatter)
    def scatter(own: torch.Tensor, parts: list[torch.Tensor], *arguments: Any, group: Any = None, **named: Any) -> Any:
        if all(len(part) == len(own) for part in parts):
            return reduce_scatter(own, parts, *arguments, group=group, **named)
        whole = torch.cat(parts)
        torch.distributed.all_reduce(whole, *arguments, group=group)
        own.copy_(whole.split([len(part) for part in parts])[torch.distributed.get_rank(group)])

    torch.distributed.all_gather, torch.distributed.reduce_scatter = gather, scatter


def _adapt_distributed_optimizer(optimizer: Any) -> None:
    """With torch's Adam (no Transformer Engine, no Apex) the distributed optimizer can't load a checkpoint into a fresh process:
    state_dict() asserts that a step was made, set-states forgets "step", and all parameters share one step tensor."""
    state_dict = optimizer.state_dict
    set_states = vars(optimizer).get("_set_main_param_and_optimizer_states")

    @functools.wraps(state_dict)
    def seeded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        for parameter in (p for group in self.optimizer.param_groups for p in group["params"]):
            if not self.optimizer.state.get(parameter):
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
        return state_dict(self, *args, **kwargs)

    def set_states_with_step(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> Any:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors = {"step": state["step"], **tensors}
        return set_states(self, model_param, tensors)

    optimizer.state_dict = seeded_state_dict
    if set_states is not None:
        optimizer._set_main_param_and_optimizer_states = set_states_with_step


def _repair_0_12(distrib_optimizer: Any) -> None:
    """quantize_param_shard raises without Transformer Engine; numpy 2 lost `product`; torch's _write_item gained an argument."""
    import inspect

    import numpy
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    vars(numpy).setdefault("product", numpy.prod)
    quantize = distrib_optimizer.quantize_param_shard
    distrib_optimizer.quantize_param_shard = lambda params, *rest, **named: quantize(params, *rest, **named) if params else None
    write_item = filesystem_async._write_item
    if "serialization_format" in inspect.signature(write_item).parameters:
        from torch.distributed.checkpoint.filesystem import SerializationFormat

        filesystem_async._write_item = functools.partial(write_item, serialization_format=SerializationFormat.TORCH_SAVE)
