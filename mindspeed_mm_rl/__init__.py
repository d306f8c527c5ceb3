"""RL post-training for language and vision-language models on Ray, megatron-core and vLLM."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

__version__ = "0.1.0"


class _TorchvisionLoader(SourceFileLoader):
    """Declares the two operator schemas that torchvision's own import needs, where its binary can't be loaded.

    The published torchvision wheel is linked against CUDA. Next to a CPU build of torch its binary fails to load (silently), and then
    `import torchvision` dies because `torchvision::nms` isn't declared. Nothing here calls these operators: transforms are Python.
    Dies when torchvision's CPU wheels come from the same index as torch's, or its import no longer needs the schemas.
    """

    def exec_module(self, module: ModuleType) -> None:
        import torch

        if torch.version.cuda is None and not _binary_loads(self.path):
            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                if operator not in _declared_operators():
                    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            # The declarations live as long as this object does.
            module._operator_schemas = library
        super().exec_module(module)


class _TorchvisionFinder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _TorchvisionLoader(spec.loader.name, spec.loader.path)
        return spec


def _declared_operators() -> set[str]:
    """Of torchvision. Another shim of the same kind may have been first."""
    import torch

    names = (schema.name for schema in torch._C._jit_get_all_schemas())
    return {name.removeprefix("torchvision::") for name in names if name.startswith("torchvision::")}


def _binary_loads(init_file: str) -> bool:
    """Loading is what torchvision does itself a moment later: a binary that fits torch declares its operators, once."""
    from pathlib import Path

    import torch

    for binary in Path(init_file).parent.glob("_C.*"):
        try:
            torch.ops.load_library(str(binary))
        except OSError:
            continue
        return True
    return False


if "torchvision" not in sys.modules and not any(isinstance(finder, _TorchvisionFinder) for finder in sys.meta_path):
    sys.meta_path.insert(0, _TorchvisionFinder())
