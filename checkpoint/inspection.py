"""What a folder of weights holds, as a table: files, names, shapes, types, and the layout that can be read off them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.layouts import shown
from checkpoint.options import InspectOptions
from mindspeed_mm_rl.models.names import Shape
from mindspeed_mm_rl.models.rank_files import Ranks, open_ranks, read_names, read_stages
from mindspeed_mm_rl.models.saved_weights import SavedWeights
from mindspeed_mm_rl.models.torch_files import read_models
from mindspeed_mm_rl.models.weight_files import HuggingFaceWeights, WeightFolder, recognise


@dataclass(frozen=True)
class Row:
    file: str
    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def numbers(self) -> int:
        return torch.Size(self.shape).numel()


def inspect(cfg: InspectOptions) -> None:
    """Prints the table and, below it, what kind of folder it is and how much it holds. Raises ValueError when it holds no weights."""
    path = Path(cfg.path).expanduser()
    kind, rows = _file(path) if path.is_file() else _folder(recognise(path))
    for row in rows:
        print(f"{row.file}  {row.name}  {list(row.shape)}  {str(row.dtype).removeprefix('torch.')}")
    types = Counter(str(row.dtype).removeprefix("torch.") for row in rows)
    size = sum(row.numbers * row.dtype.itemsize for row in rows)
    print(f"{path}: {kind}")
    print(
        f"{len({row.file for row in rows})} files, {len(rows)} weights, {sum(row.numbers for row in rows):,} numbers, {size / 1e9:.3f} GB, "
        + ", ".join(f"{count} of {name}" for name, count in types.most_common())
    )


def _file(path: Path) -> tuple[str, list[Row]]:
    if path.suffix == ".safetensors":
        weights = HuggingFaceWeights(path)
        return "a safetensors file", _hf_rows(weights)
    models = read_models(path)
    rows = [Row(key, name, tuple(tensor.shape), tensor.dtype) for key, model in models.items() for name, tensor in model.items()]
    return f"a file of one rank ({', '.join(models)})", rows


def _folder(found: WeightFolder) -> tuple[str, list[Row]]:
    match found.kind:
        case "hf":
            return "a Hugging Face folder", _hf_rows(HuggingFaceWeights(found.weights))
        case "training":
            saved = SavedWeights(found.weights)
            rows = [Row(found.weights.name, name, shape, saved.dtype(name)) for name, shape in saved.shapes.items()]
            iteration = "" if found.iteration is None else f" of iteration {found.iteration}"
            return f"a training save{iteration} (torch_dist)", rows
    ranks = open_ranks(found.ranks)
    return layout_line(ranks), list(_rank_rows(ranks))


def layout_line(ranks: Ranks) -> str:
    """Example: files of ranks: tp 2, pp 2, vpp 1, ep 1; text layers [[14, 14]], vision layers [[32, 0]]; names of MindSpeed-MM."""
    tensor, pipeline, expert = ranks.counts
    virtual = len(next(iter(ranks.contents.values())))
    vision = read_stages(ranks, vision=True)
    dialect = read_names(ranks)
    parts = [
        f"text layers {shown(read_stages(ranks, vision=False))}",
        *([f"vision layers {shown(vision)}"] if any(map(any, vision)) else []),
    ]
    names = "names of MindSpeed-MM" if dialect.prefix else "names of megatron-core and MindSpeed-LLM"
    extras = [", q, k, v apart" if dialect.canonical else "", f", experts {dialect.experts}" if dialect.experts != "local" else ""]
    return f"files of ranks: tp {tensor}, pp {pipeline}, vpp {virtual}, ep {expert}; {', '.join(parts)}; {names}{''.join(extras)}"


def _hf_rows(weights: HuggingFaceWeights) -> list[Row]:
    return [Row(weights.file(name).name, name, weights.shapes[name], weights.dtype(name)) for name in sorted(weights)]


def _rank_rows(ranks: Ranks) -> Iterator[Row]:
    for rank in sorted(ranks.files):
        for key, model in sorted(ranks.contents[rank].items()):
            folder = ranks.files[rank].parent.name
            for name, tensor in model.items():
                yield Row(folder if key == "model" else f"{folder} {key}", name, tuple(tensor.shape), tensor.dtype)
