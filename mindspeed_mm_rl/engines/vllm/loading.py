"""How tensors that are brought get into the layers of a vLLM model, by the model's own load_weights.

from vLLM 0.18   vLLM takes the layers apart and puts them together again, each when it has all of its tensors
before           the same here, as far as models without quantization need it
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from vllm.config import ModelConfig
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from mindspeed_mm_rl.models.names import canonical_hf_name
from mindspeed_mm_rl.platforms import compat, device
from mindspeed_mm_rl.weights.device import Arrivals
from mindspeed_mm_rl.weights.host import Views, WeightHandle

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_VISION_PREFIXES = ("visual.", "model.visual.")
_LAYER = re.compile(r"(?:^|\.)((?:layers|blocks)\.\d+)\.")
_WRAPPERS = re.compile(r"^(?:(?:language_model|model)\.)+")
_unpacked: WeakKeyDictionary[torch.nn.Module, dict[str, dict[str, torch.nn.Parameter]]] = WeakKeyDictionary()
"""By model and layer: parameters as load_weights knows them, without memory."""


def wanted(model: torch.nn.Module, views: Views, has_head: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Without the vision tower where the engine was built without one; with the head that a tied model doesn't send.

    vLLM keeps the old head of a tied model on CPU, where it computes from a packed copy, unless the head is loaded by its own name.
    """
    has_vision = any(name.startswith(_VISION_PREFIXES) for name, _ in model.named_parameters())
    yield from ((name, view) for name, view in views if has_vision or not name.startswith(_VISION_PREFIXES))
    if not has_head:
        yield from ((_HEAD, view) for name, view in views if canonical_hf_name(name) == _EMBEDDING)


def brings_head(source: WeightHandle | Arrivals) -> bool:
    return any(slot.name == _HEAD for slot in source.slots)


def remember(model: torch.nn.Module) -> None:
    """Call before vLLM packs the weights of a new model."""
    if not compat.vllm_reloads_by_layer():
        _unpacked[model] = {
            name: {part: _like(parameter, "meta") for part, parameter in layer.named_parameters(recurse=False)}
            for name, layer in model.named_modules()
            if _packs(layer)
        }


def _packs(layer: torch.nn.Module) -> bool:
    method = vars(layer).get("quant_method", layer._modules.get("quant_method"))
    packs = type(method).process_weights_after_loading if isinstance(method, QuantizeMethodBase) else None
    return packs is not None and packs is not QuantizeMethodBase.process_weights_after_loading


def _like(parameter: torch.nn.Parameter, device: torch.device | str) -> torch.nn.Parameter:
    """Of the same shape, type and loader, with other numbers."""
    empty = torch.nn.Parameter(torch.empty_like(parameter.data, device=device), requires_grad=False)
    # vLLM's own classes of parameters bring the loader.
    empty.__class__ = type(parameter)
    vars(empty).update(vars(parameter))
    return empty


@torch.no_grad()
def load_layers(model: torch.nn.Module, model_config: ModelConfig, source: WeightHandle | Arrivals) -> None:
    """Before vLLM 0.18. Beside the model, memory holds one layer at a time, and of a chunk what goes on in the next."""
    from vllm.attention import Attention

    has_head, left = brings_head(source), Counter(_place(slot.name) for slot in source.slots)
    waiting: dict[str, Views] = defaultdict(list)
    for views in source.chunks():
        for name, view in views:
            waiting[_place(name)].append((name, view))
        for place in [place for place, found in waiting.items() if len(found) == left[place]]:
            _load_together(model, list(wanted(model, waiting.pop(place), has_head)))
        if isinstance(source, Arrivals):
            waiting = defaultdict(list, {place: [(name, view.clone()) for name, view in found] for place, found in waiting.items()})
    for layer in model.modules():
        if isinstance(layer, Attention):
            # Latent attention keeps products of weights.
            layer.process_weights_after_loading(model_config.dtype)


def _place(name: str) -> str:
    """layers.3 of the text and blocks.3 of the vision tower for what lies in them; else the layer of the weight itself."""
    found = _LAYER.search(name)
    return found.group(1) if found else _WRAPPERS.sub("", name).rpartition(".")[0]


def _load_together(model: torch.nn.Module, views: Views) -> None:
    """Whole layers: what they had is lost."""
    places = {_place(name) for name, _ in views}
    packed = [(model.get_submodule(name), parts) for name, parts in _unpacked[model].items() if _place(f"{name}.weight") in places]
    kernels = [dict(layer.named_parameters(recurse=False)) for layer, _ in packed]
    for layer, parts in packed:
        for name, part in parts.items():
            layer.register_parameter(name, _like(part, device.current()))
    model.load_weights(iter(views))
    for (layer, _), kernel in zip(packed, kernels, strict=True):
        layer.quant_method.process_weights_after_loading(layer)
        _keep_addresses(layer, kernel)


def _keep_addresses(layer: torch.nn.Module, kernel: dict[str, torch.nn.Parameter]) -> None:
    """Graphs were captured with the memory of the old ones, and only that memory sleeps."""
    for name, new in list(layer.named_parameters(recurse=False)):
        old = kernel.get(name)
        if old is not None and (old.shape, old.dtype, old.stride()) == (new.shape, new.dtype, new.stride()):
            old.data.copy_(new)
            layer.register_parameter(name, old)
