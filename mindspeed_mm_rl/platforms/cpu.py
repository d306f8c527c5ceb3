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

from mindspeed_mm_rl.platforms.packed_sdpa import Segments, packed_sdpa
from mindspeed_mm_rl.platforms.plain import grouped_matmul, rms_norm, rope, swiglu
from mindspeed_mm_rl.platforms.shared_memory import MemoryFile, open_file

__all__ = [
    "adapt_megatron",
    "can_share_memory",
    "grouped_matmul",
    "host_memory",
    "open_shared",
    "packed_attention",
    "rms_norm",
    "rope",
    "shared_memory",
    "swiglu",
]

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


def can_share_memory() -> bool:
    return True


shared_memory, open_shared = MemoryFile, open_file


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
        import megatron.core.optimizer.distrib_optimizer
        import megatron.core.transformer.moe.token_dispatcher  # noqa: F401
    # The "GPU" generator is the CPU's own here: megatron's warning that the CPU's moved while it drew from the GPU's is always true.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)


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
