"""The conversions: Hugging Face -> files of ranks, files of ranks or a training save -> Hugging Face, files of ranks -> of other ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint.folders import check_target, copy_side_files, new_folder, write_config
from checkpoint.guess import config_of_ranks
from checkpoint.layouts import check_found, layout_from, unseen_in
from checkpoint.options import FormatOptions, HfToDcpOptions, HfToMmOptions, MmToHfOptions, ParallelConfig, ResplitOptions
from checkpoint.rank_writer import CHECKPOINT_VERSION, pending, point_to, rank_files
from checkpoint.safetensors_writer import SafetensorsFile, plan_shards, write_index
from checkpoint.saved_writer import write_saved
from checkpoint.tensor_files import Pending
from checkpoint.training_yaml import check_training_yaml
from checkpoint.work import Work
from mindspeed_mm_rl.models.name_rules import Part
from mindspeed_mm_rl.models.names import PARTS, has_value_head, transformers_5_name, with_value_head
from mindspeed_mm_rl.models.placement import Layout, placement
from mindspeed_mm_rl.models.rank_files import open_ranks, spoken_entries
from mindspeed_mm_rl.models.weight_files import ACTOR_FOLDER, CRITIC_FOLDER, RELEASE, FolderKind, WeightFolder, read_config, recognise
from mindspeed_mm_rl.models.weight_sources import HuggingFaceSource, RankSource, Source, known_files, known_names, open_source

_VISION_PARTS: tuple[Part, ...] = ("vision", "projector")


def hf_to_mm(cfg: HfToMmOptions) -> None:
    """Writes a Hugging Face model as files of ranks, for actor_config.load, reference and vit_config.load.

    Raises ValueError, before anything is written, when layout, weights and config.json do not agree.
    """
    source_dir, target = Path(cfg.hf_config.hf_dir).expanduser(), Path(cfg.mm_dir).expanduser()
    first_logit = cfg.orm_head == "first_logit"
    config = model_config(source_dir, cfg.orm or first_logit)
    layout = layout_from(cfg.parallel_config, cfg.common_model_config, cfg.format, config)
    parts = _VISION_PARTS if cfg.save_vit_only else PARTS
    if cfg.save_vit_only and "vision_config" not in config:
        raise ValueError(f"save_vit_only is true but the model in {source_dir} ({config.get('model_type')}) has no vision encoder")
    if cfg.training_yaml:
        role = "critic_config" if has_value_head(config) else "actor_config"
        check_training_yaml(Path(cfg.training_yaml).expanduser(), layout, role, cfg.save_vit_only)
    check_target(target)
    found = expect(("hf",), source_dir, config, "hf_to_mm reads a Hugging Face folder")
    source = open_source(found, config, parts, first_logit=first_logit)
    _write_ranks("hf_to_mm", target, source, layout, config, parts, cfg.workers)
    _say_left_out(source)
    print(f"wrote {target} ({'the vision encoder alone' if cfg.save_vit_only else 'load it as actor_config.load'})")


def mm_to_hf(cfg: MmToHfOptions) -> None:
    """Writes a Hugging Face folder from files of ranks or a training save; other files are copied from hf_config.hf_dir.

    Raises ValueError, before anything is written, when layout, weights and config.json do not agree.
    """
    source_dir, target, hf_dir = (Path(name).expanduser() for name in (cfg.mm_dir, cfg.save_hf_dir, cfg.hf_config.hf_dir))
    config = model_config(hf_dir, cfg.orm)
    if has_value_head(config) and "vision_config" in config:
        raise ValueError(
            f"Hugging Face has no sequence classification class for {config['model_type']}: a critic of it stays as it was saved"
        )
    check_target(target)
    found = expect(("mm", "ranks", "training"), source_dir, config, "mm_to_hf reads files of ranks or a training save")
    source = open_source(found, config, PARTS, unseen_in(cfg.format))
    if isinstance(source, RankSource):
        check_found(cfg.parallel_config, source.layout, source_dir)
        if source.parts != PARTS:
            raise ValueError(f"{source_dir} holds the vision encoder alone, which is no Hugging Face model; give the whole model's folder")
    names = known_names(hf_dir)
    if cfg.common_model_config.new_transformers_weight_key:
        names = {name: transformers_5_name(name, "vision_config" in config) for name in source.shapes}
    work = Work("mm_to_hf", cfg.workers)
    tensors = [
        Pending(names.get(name, name), source.shapes[name], source.dtype(name), lambda name=name: [work.watch(name, source[name])])
        for name in source.shapes
    ]
    with new_folder(target) as folder:
        files = plan_shards(tensors, known_files(hf_dir))
        work.write([SafetensorsFile(folder / name, shard) for name, shard in files.items()])
        write_index(folder, files)
        copy_side_files(hf_dir, folder)
        if cfg.orm:
            write_config(folder, config)
    print(f"wrote {target} from {found.weights} ({found.kind})")


def hf_to_mm_dcp(cfg: HfToDcpOptions) -> None:
    """Writes a Hugging Face model as a torch_dist folder with the names of MindSpeed-MM. Raises ValueError as hf_to_mm does."""
    source_dir, target = Path(cfg.hf_config.hf_dir).expanduser(), Path(cfg.mm_dir).expanduser()
    config = model_config(source_dir, cfg.orm)
    layout = layout_from(ParallelConfig(), cfg.common_model_config, FormatOptions(), config)
    check_target(target)
    source = open_source(expect(("hf",), source_dir, config, "hf_to_mm_dcp reads a Hugging Face folder"), config)
    work = Work("hf_to_mm_dcp")
    file = next(placement(spoken_entries(config, layout), layout))
    tensors = [pending(piece, source, work.watch) for piece in file.models["model"]]
    with new_folder(target) as folder:
        with work.shown(sum(tensor.nbytes for tensor in tensors)):
            write_saved(folder / RELEASE, tensors, CHECKPOINT_VERSION)
        point_to(folder, layout)
    _say_left_out(source)
    print(f"wrote {target}")


def mm_to_hf_dcp(cfg: MmToHfOptions) -> None:
    """mm_to_hf for a torch_dist folder; mm_to_hf itself recognises one too."""
    mm_to_hf(cfg)


def resplit(cfg: ResplitOptions) -> None:
    """Writes files of ranks as files of other ranks, as a conversion from the Hugging Face model would.

    Raises ValueError, before anything is written, when layouts, weights and config.json do not agree.
    """
    source_dir, target = Path(cfg.source_dir).expanduser(), Path(cfg.target_dir).expanduser()
    config = _config_for_resplit(cfg, source_dir)
    layout = layout_from(cfg.target_parallel_config, cfg.common_model_config, cfg.target_format, config, "target_parallel_config")
    check_target(target)
    found = expect(("mm", "ranks"), source_dir, config, "resplit reads files of ranks")
    source = open_source(found, config, PARTS, unseen_in(cfg.source_format))
    assert isinstance(source, RankSource)
    check_found(cfg.source_parallel_config, source.layout, source_dir, "source_parallel_config")
    _write_ranks("resplit", target, source, layout, config, source.parts, cfg.workers)
    print(f"wrote {target} from {source_dir}")


def _config_for_resplit(cfg: ResplitOptions, source_dir: Path) -> dict[str, Any]:
    if cfg.hf_config is not None:
        return model_config(Path(cfg.hf_config.hf_dir).expanduser(), cfg.orm)
    found = expect(("mm", "ranks"), source_dir, {}, "resplit reads files of ranks")
    config = config_of_ranks(open_ranks(found.ranks), cfg.source_parallel_config)
    heads, pairs, width = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    print(f"without hf_config.hf_dir the model is taken to have {heads} heads and {pairs} key/value heads of {width} rows")
    return config


def model_config(folder: Path, orm: bool) -> dict[str, Any]:
    config = read_config(folder)
    return with_value_head(config) if orm else config


def expect(kinds: tuple[FolderKind, ...], folder: Path, config: Mapping[str, Any], rule: str) -> WeightFolder:
    found = recognise(folder, CRITIC_FOLDER if has_value_head(config) else ACTOR_FOLDER)
    if found.kind not in kinds:
        raise ValueError(f"{rule}, but {folder} is of kind {found.kind!r}")
    return found


def _write_ranks(
    title: str, target: Path, source: Source, layout: Layout, config: Mapping[str, Any], parts: tuple[Part, ...], workers: int
) -> None:
    work = Work(title, workers)
    with new_folder(target) as folder:
        work.write(list(rank_files(folder, source, layout, config, parts, work.watch)))
        point_to(folder, layout)


def _say_left_out(source: Source) -> None:
    if isinstance(source, HuggingFaceSource) and source.left_out:
        print(f"left out: {len(source.left_out)} weights of layers that predict further tokens, as {min(source.left_out)}")
