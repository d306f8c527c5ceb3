"""Folders of weights: recognised by content, read without megatron and without unpickling, errors in one sentence."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint

from checkpoint.safetensors_writer import write_safetensors
from mindspeed_mm_rl.models.saved_weights import SavedWeights
from mindspeed_mm_rl.models.weight_files import HuggingFaceWeights, check_weights, read_megatron_weights, read_weights, recognise
from mindspeed_mm_rl.models.weight_layout import to_megatron
from tests.checkpoints import LAYERS, load, make_training_save, pending, write_mm


@pytest.fixture(scope="module")
def training_save(tiny_vl, tmp_path_factory):
    weights, config = load(tiny_vl)
    return make_training_save(tmp_path_factory.mktemp("save"), to_megatron(weights, config))


@pytest.fixture(scope="module")
def mm_folder(tiny_vl, tmp_path_factory):
    weights, config = load(tiny_vl)
    return write_mm(tmp_path_factory.mktemp("mm") / "out", to_megatron(weights, config))


def test_three_kinds_are_recognised(tiny_vl, mm_folder, training_save):
    assert recognise(tiny_vl).kind == "hf"
    assert recognise(mm_folder).kind == recognise(mm_folder / "release").kind == "mm"
    found = recognise(training_save)
    assert (found.kind, found.weights, found.iteration) == ("training", training_save / "iter_0000010" / "actor", 10)
    assert recognise(training_save / "iter_0000010") == found
    assert recognise(training_save / "iter_0000010" / "actor") == found


def test_text_file_picks_the_iteration(training_save, tmp_path):
    copy = shutil.copytree(training_save, tmp_path / "save")
    shutil.copytree(copy / "iter_0000010", copy / "iter_0000020")
    (copy / "latest_checkpointed_iteration.txt").write_text("20\n")
    assert recognise(copy).iteration == 20
    (copy / "latest_checkpointed_iteration.txt").write_text("30")
    with pytest.raises(ValueError, match="says 30 but .*iter_0000030 does not exist .there: iter_0000010, iter_0000020."):
        recognise(copy)
    (copy / "latest_checkpointed_iteration.txt").write_text("last")
    with pytest.raises(ValueError, match="says 'last'; it must say release or an iteration number"):
        recognise(copy)


def test_all_kinds_give_the_same_weights(tiny_vl, mm_folder, training_save):
    weights, config = load(tiny_vl)
    expected = to_megatron(weights, config)
    for folder in (tiny_vl, mm_folder, training_save):
        got = read_megatron_weights(folder, config)
        assert set(got) == set(expected)
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_a_file_is_mapped_as_torch_npu_wants_it(tiny_vl, mm_folder, monkeypatch):
    """Its load, which takes the place of torch's, raises TypeError for a path that isn't text."""
    mapped, load_file = [], torch.load

    def noted(file, **options):
        mapped.append((type(file), options["mmap"]))
        return load_file(file, **options)

    monkeypatch.setattr(torch, "load", noted)
    assert read_megatron_weights(mm_folder, load(tiny_vl)[1])
    assert set(mapped) == {(str, True)}


def test_a_file_may_repeat_the_tied_embedding(tiny_text, tmp_path):
    weights, config = load(tiny_text)
    expected = to_megatron(weights, config)
    embedding = expected["text_decoder.embedding.word_embeddings.weight"]
    for name, output_layer in (("same", embedding.clone()), ("other", embedding + 1)):
        write_mm(tmp_path / name, {**expected, "text_decoder.output_layer.weight": output_layer})
    assert read_megatron_weights(tmp_path / "same", config).keys() == expected.keys()
    with pytest.raises(ValueError, match="text_decoder.output_layer.weight differs"):
        read_megatron_weights(tmp_path / "other", config)


def test_bfloat16_and_unstacked_layers_are_read(tmp_path):
    tensors = {f"model.{LAYERS}{n}.mlp.linear_fc2.weight": torch.randn(3, 5).bfloat16() for n in range(2)}
    distributed_checkpoint.save(tensors, checkpoint_id=tmp_path)
    saved = SavedWeights(tmp_path)
    assert {f"model.{name}": saved.shapes[name] for name in saved} == dict.fromkeys(tensors, (3, 5))
    assert all(torch.equal(saved[name.removeprefix("model.")], tensor) for name, tensor in tensors.items())
    assert all(tensor.dtype == torch.bfloat16 for tensor in saved.values())


def test_weights_of_another_shape_are_refused_before_they_are_read(tiny_vl, mm_folder, training_save):
    _, config = load(tiny_vl)
    deeper = {**config, "text_config": {**config["text_config"], "num_hidden_layers": 3}}
    for folder in (tiny_vl, mm_folder, training_save):
        with pytest.raises(ValueError, match=r"missing \(.*layers\.2\."):
            check_weights(folder, deeper)
        assert check_weights(folder, config).kind == recognise(folder).kind


def test_a_folder_that_holds_nothing_says_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="no weights that can be read .found: notes.txt.; weights are a Hugging Face folder"):
        recognise(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        recognise(tmp_path / "nowhere")


def test_a_folder_of_two_kinds_is_refused(tiny_text, tmp_path):
    both = shutil.copytree(tiny_text, tmp_path / "both")
    (both / "latest_checkpointed_iteration.txt").write_text("release")
    with pytest.raises(ValueError, match="which of the two is meant"):
        recognise(both)


def test_two_ranks_with_the_whole_model_are_refused(tiny_vl, mm_folder, tmp_path):
    _, config = load(tiny_vl)
    copy = shutil.copytree(mm_folder, tmp_path / "split")
    shutil.copytree(copy / "release" / "mp_rank_00", copy / "release" / "mp_rank_01")
    assert recognise(copy).kind == "ranks"
    with pytest.raises(ValueError, match=r"mp_rank_0. ?.*has shape \[.*\] instead of \["):
        read_megatron_weights(copy, config)


def test_an_incomplete_save_is_refused(tmp_path):
    (tmp_path / "iter_0000003").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    with pytest.raises(ValueError, match="the save is incomplete"):
        recognise(tmp_path)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_pickle_is_run(tmp_path):
    pwned = tmp_path / "pwned"
    metadata = tmp_path / "iter_0000001" / "actor" / ".metadata"
    metadata.parent.mkdir(parents=True)
    metadata.write_bytes(pickle.dumps(Evil(pwned)))
    with pytest.raises(ValueError, match="is not the metadata of a training save .*mkdir has no place"):
        read_weights(tmp_path / "iter_0000001")
    # A dotted name would reach, through an allowed module, whatever that module has imported.
    metadata.write_bytes(
        b"\x80\x04" + _short("torch.distributed.checkpoint.metadata") + _short("os.mkdir") + b"\x93" + _short(str(pwned)) + b"\x85R."
    )
    with pytest.raises(ValueError, match="os.mkdir has no place"):
        read_weights(tmp_path / "iter_0000001")
    model_file = tmp_path / "release" / "mp_rank_00" / "model_optim_rng.pt"
    model_file.parent.mkdir(parents=True)
    torch.save({"model": Evil(pwned)}, model_file)
    with pytest.raises(ValueError, match="never unpickled"):
        read_weights(tmp_path / "release")
    assert not pwned.exists()


def _short(text: str) -> bytes:
    """The pickle opcode of a short string."""
    return b"\x8c" + bytes([len(text.encode())]) + text.encode()


def test_damaged_files_are_named(tiny_text, training_save, mm_folder, tmp_path):
    _, config = load(tiny_text)
    hf = shutil.copytree(tiny_text, tmp_path / "hf")
    _cut(hf / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors is damaged or cut short"):
        read_megatron_weights(hf, config)
    mm = shutil.copytree(mm_folder, tmp_path / "mm")
    _cut(mm / "release" / "mp_rank_00" / "model_optim_rng.pt")
    with pytest.raises(ValueError, match="model_optim_rng.pt is damaged"):
        read_weights(mm)
    save = shutil.copytree(training_save, tmp_path / "save")
    for file in (save / "iter_0000010" / "actor").glob("*.distcp"):
        _cut(file)
    with pytest.raises(ValueError, match="cannot be read, the save is damaged or incomplete"):
        dict(read_weights(save))


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_shards_have_an_index_and_read_back(tiny_vl, tmp_path):
    weights, _ = load(tiny_vl)
    write_safetensors(tmp_path, pending(weights), max_bytes=200_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    back = HuggingFaceWeights(tmp_path)
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    (tmp_path / files[1]).unlink()
    with pytest.raises(ValueError, match=f"names 1 of {len(files)} files that do not exist .{files[1]}."):
        HuggingFaceWeights(tmp_path)
