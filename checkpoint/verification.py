"""Two folders of weights of any kinds, tensor by tensor and bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from checkpoint.guess import config_of_ranks
from checkpoint.layouts import unseen_in
from checkpoint.options import ParallelConfig, VerifyOptions
from mindspeed_mm_rl.models.names import has_value_head, with_value_head
from mindspeed_mm_rl.models.rank_files import open_ranks, same_bits
from mindspeed_mm_rl.models.weight_files import ACTOR_FOLDER, CRITIC_FOLDER, read_config, recognise
from mindspeed_mm_rl.models.weight_sources import Source, open_source

_SHOWN = 10


def verify(cfg: VerifyOptions) -> int:
    """0 when every weight is in both with the same type, shape and bits, else 1 and a line for each of the first that differ.

    Raises ValueError when one of the two holds no weights or those of another model.
    """
    paths = [Path(name).expanduser() for name in (cfg.first, cfg.second)]
    config = _config(cfg, paths)
    role = CRITIC_FOLDER if has_value_head(config) else ACTOR_FOLDER
    forms = (cfg.first_format, cfg.second_format)
    first, second = (open_source(recognise(path, role), config, unseen=unseen_in(form)) for path, form in zip(paths, forms, strict=True))
    differences = [line for name in sorted(first.shapes.keys() | second.shapes.keys()) for line in _compare(name, first, second)]
    for line in differences[:_SHOWN]:
        print(line)
    if differences:
        print(f"{len(differences)} of {len(first.shapes.keys() | second.shapes.keys())} weights differ between {paths[0]} and {paths[1]}")
        return 1
    print(f"{len(first.shapes)} weights are bit for bit the same in {paths[0]} and {paths[1]}")
    return 0


def _config(cfg: VerifyOptions, paths: list[Path]) -> dict[str, Any]:
    given = [Path(cfg.hf_config.hf_dir).expanduser()] if cfg.hf_config else []
    folders = [path for path in (*given, *paths) if (path / "config.json").is_file()]
    if given or folders:
        config = read_config(given[0] if given else folders[0])
        return with_value_head(config) if cfg.orm else config
    found = [recognise(path) for path in paths]
    if any(each.kind == "training" for each in found):
        raise ValueError("neither folder has a config.json; give --cfg.hf_config.hf_dir, the model's Hugging Face folder")
    # The one with more tensor ranks says more of where heads end.
    return config_of_ranks(max((open_ranks(each.ranks) for each in found), key=lambda ranks: ranks.counts[0]), ParallelConfig())


def _compare(name: str, first: Source, second: Source) -> list[str]:
    if name not in first.shapes or name not in second.shapes:
        return [f"{name} is only in the {'second' if name in second.shapes else 'first'}"]
    if first.dtype(name) != second.dtype(name):
        return [f"{name} is {first.dtype(name)} in the first and {second.dtype(name)} in the second"]
    left, right = first[name], second[name]
    if same_bits(left, right):
        return []
    other = left != right
    gap = (left.double() - right.double()).abs().nan_to_num(nan=torch.inf).max()
    return [f"{name} differs in {int(other.sum())} of {other.numel()} values, by at most {gap:.3g}"]
