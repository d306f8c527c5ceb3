"""Random layouts for a model of tests.convert.families, and the conversions as functions of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from hypothesis import strategies

from checkpoint.convert import hf_to_mm, mm_to_hf, resplit
from checkpoint.options import (
    CommonModelConfig,
    FormatOptions,
    HfConfig,
    HfToMmOptions,
    MmToHfOptions,
    ParallelConfig,
    ResplitOptions,
)
from tests.convert.families import FAMILIES, same, weights

LAYERS = 4


@dataclass(frozen=True)
class Choice:
    """What a user would type for one folder of rank files."""

    llm: tuple[tuple[int, ...], ...] = ((LAYERS,),)
    vit: tuple[tuple[int, ...], ...] | None = None
    tp: int = 1
    vit_tp: int = 0
    ep: int = 1
    canonical: bool = False
    form: tuple[tuple[str, object], ...] = ()

    @property
    def parallel(self) -> ParallelConfig:
        vit = None if self.vit is None else [list(row) for row in self.vit]
        llm = [list(row) for row in self.llm]
        return ParallelConfig(llm_pp_layers=llm, vit_pp_layers=vit, tp_size=self.tp, vit_tp_size=self.vit_tp, ep_size=self.ep)

    @property
    def format(self) -> FormatOptions:
        return FormatOptions(**dict(self.form))

    @property
    def common(self) -> CommonModelConfig:
        return CommonModelConfig(enable_canonical_hf_struct=self.canonical)


WAYS = {
    "tp2": Choice(tp=2),
    "tp4": Choice(tp=4),
    "uneven pp2": Choice(llm=((1, 3),), vit=((4, 0),)),
    "uneven pp3": Choice(llm=((2, 1, 1),), vit=((1, 0, 3),), tp=2),
    "vpp2": Choice(llm=((1, 1), (1, 1)), vit=((2, 1), (1, 0))),
    "vpp2 at pp1": Choice(llm=((3,), (1,)), vit=((4,), (0,)), tp=2),
    "first stages empty": Choice(llm=((0, 2, 2),), vit=((2, 2, 0),)),
}
EXPERT_WAYS = {
    "ep2": Choice(ep=2),
    "ep4 tp2": Choice(ep=4, tp=2),
    "ep2 tp4 pp2": Choice(ep=2, tp=4, llm=((3, 1),)),
    "ep2 extended by tp4": Choice(ep=2, tp=4, form=(("moe_tp_extend_ep", True),)),
    "grouped, plain names": Choice(ep=2, tp=2, form=(("expert_names", "grouped"), ("moe_tp_extend_ep", False), ("style", "mcore"))),
}


def ways_of(family: str) -> dict[str, Choice]:
    """Those that fit the family's kind of model."""
    traits = FAMILIES[family]
    dense = WAYS if traits.vision else {name: replace(choice, vit=None) for name, choice in WAYS.items()}
    return dense | (EXPERT_WAYS if traits.experts else {})


CASES = {f"{family}-{way}": (family, choice) for family in FAMILIES for way, choice in ways_of(family).items()}


@strategies.composite
def stages(draw: strategies.DrawFn, virtual: int, width: int) -> tuple[tuple[int, ...], ...]:
    """LAYERS in virtual x width numbers, none negative."""
    cuts = sorted(draw(strategies.lists(strategies.integers(0, LAYERS), min_size=virtual * width - 1, max_size=virtual * width - 1)))
    counts = [end - start for start, end in zip([0, *cuts], [*cuts, LAYERS], strict=True)]
    return tuple(tuple(counts[row * width : (row + 1) * width]) for row in range(virtual))


@strategies.composite
def choices(draw: strategies.DrawFn, family: str) -> Choice:
    traits = FAMILIES[family]
    virtual, width = draw(strategies.sampled_from([1, 1, 2])), draw(strategies.sampled_from([1, 2, 3]))
    tp = draw(strategies.sampled_from([1, 2, 4]))
    vit = draw(stages(virtual, width)) if traits.vision else None
    form: dict[str, object] = {}
    if traits.vision:
        form["vit_qkv"] = draw(strategies.sampled_from(["per_head", "concatenated"]))
    elif draw(strategies.booleans()):
        form["style"] = "mcore"
        form["make_vocab_size_divisible_by"] = draw(strategies.sampled_from([0, 24, 7]))
    ep = 1
    if traits.experts:
        ep = draw(strategies.sampled_from([1, 2, 4]))
        form["expert_names"] = draw(strategies.sampled_from(["local", "grouped", "te_grouped"]))
        form["moe_tp_extend_ep"] = tp * ep <= 8 and draw(strategies.booleans())
    return Choice(
        llm=draw(stages(virtual, width)),
        vit=vit,
        tp=tp,
        vit_tp=draw(strategies.sampled_from([0, 1, 2, 4])) if traits.vision else 0,
        ep=ep,
        canonical=not traits.experts and draw(strategies.booleans()),
        form=tuple(sorted(form.items())),
    )


def to_mm(source: Path, target: Path, choice: Choice, vit_only: bool = False) -> Path:
    options = {"parallel_config": choice.parallel, "common_model_config": choice.common, "format": choice.format}
    hf_to_mm(HfToMmOptions(str(target), HfConfig(str(source)), save_vit_only=vit_only, **options))
    return target


def to_hf(source: Path, hf_dir: Path, target: Path, choice: Choice = Choice(), check: bool = False) -> Path:
    parallel = choice.parallel if check else ParallelConfig()
    mm_to_hf(MmToHfOptions(str(target), str(source), HfConfig(str(hf_dir)), parallel_config=parallel, format=choice.format))
    return target


def again(source: Path, hf_dir: Path, target: Path, before: Choice, after: Choice) -> Path:
    options = {"source_parallel_config": before.parallel, "target_parallel_config": after.parallel, "common_model_config": after.common}
    forms = {"source_format": before.format, "target_format": after.format}
    resplit(ResplitOptions(str(source), str(target), hf_config=HfConfig(str(hf_dir)), **options, **forms))
    return target


def files(folder: Path) -> dict[str, dict[str, object]]:
    """Everything of a folder of rank files, with torch's own reader."""
    pointer = (folder / "latest_checkpointed_iteration.txt").read_text()
    return {"pointer": {"text": pointer}} | {
        str(path.relative_to(folder)): torch.load(path, weights_only=True) for path in sorted(folder.rglob("model_optim_rng.pt"))
    }


def equal(left: object, right: object) -> bool:
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return left == right


def check_pair(source: Path, folder: Path, first: Choice, second: Choice) -> None:
    """Hugging Face -> first -> Hugging Face changes nothing, and first -> second is what Hugging Face -> second is."""
    to_mm(source, folder / "first", first)
    assert same(weights(to_hf(folder / "first", source, folder / "hf", first)), weights(source))
    to_mm(source, folder / "direct", second)
    again(folder / "first", source, folder / "second", first, second)
    assert equal(files(folder / "second"), files(folder / "direct"))
