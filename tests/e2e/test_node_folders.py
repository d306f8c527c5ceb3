"""Two nodes without shared storage: here both are this machine, and a folder stands for the disk of the second one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.workers import storage as storage_module
from mindspeed_mm_rl.workers.failure import Member, WorkerFailed
from mindspeed_mm_rl.workers.nodes import storage_of
from mindspeed_mm_rl.workers.storage import NodeDisk, Storage, file_sizes
from tests import node_ranks
from tests.plans import optimizer_plan, train_plan, whole_plan
from tests.rank_pool import RankPool

LAYOUTS = {
    "pipeline, each rank writes what it holds": ({"pipeline_parallel_size": 2}, True),
    "data parallel, the first rank writes for both": ({"optimizer": optimizer_plan(use_distributed_optimizer=True)}, False),
}
"""Fields of the plan, and whether the second rank writes anything."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=128 << 20, log_to_driver=False)
    yield
    ray.shutdown()


def disk(root: Path) -> Member:
    actor = ray.remote(NodeDisk).options(num_cpus=0).remote(str(root))
    return Member("storage process", 0, actor, node="10.0.0.2")


def two_nodes(root: Path) -> Storage:
    storage = Storage([disk(root)], 60.0)
    storage.apart = list(storage.disks)
    return storage


@pytest.fixture
def plan(tiny_text: Path, tmp_path: Path) -> Plan:
    return whole_plan(tiny_text, tmp_path / "train.parquet", tmp_path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_of_two_nodes_save_and_go_on(
    cluster: None, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # A shard then takes several parts on its way.
    monkeypatch.setattr(storage_module, "PART_BYTES", 10_000)
    fields, both_write = LAYOUTS[name]
    plan, other_root = train_plan(tiny_text, **fields), tmp_path / "disk of the other"
    storage, folder, shared = two_nodes(other_root), tmp_path / "save" / "actor", tmp_path / "shared" / "actor"
    folder.mkdir(parents=True)
    shared.mkdir(parents=True)
    roots = ["", str(other_root)]
    with RankPool(seconds=60.0) as pool:
        straight = pool.run(2, node_ranks.run, plan, ["", ""], str(shared), False)
        with storage.written(str(folder)):
            there = other_root / str(folder).lstrip("/")
            assert there.is_dir()
            assert pool.run(2, node_ranks.run, plan, roots, str(folder), False) == straight
            written = file_sizes(there)
            assert bool(written) == both_write and not written.keys() & file_sizes(folder).keys()
        collected, expected = file_sizes(folder), file_sizes(shared)
        # The metadata holds the path that was written to.
        assert collected.pop(".metadata") > 0 and expected.pop(".metadata") > 0
        assert collected == expected and len(collected) >= 4 and not there.exists()
        storage.bring(str(folder))
        assert file_sizes(there) == file_sizes(folder)
        resumed = pool.run(2, node_ranks.run, plan, roots, str(folder), True)
        assert resumed == [[second] for _, second in straight]
    storage.forget()
    assert file_sizes(there) == {} and file_sizes(folder)


def test_a_save_that_fails_leaves_nothing_on_the_other_node(cluster: None, tmp_path: Path) -> None:
    storage, folder = two_nodes(tmp_path / "other"), tmp_path / "save"
    folder.mkdir()
    with pytest.raises(OSError, match="no space"), storage.written(str(folder)):
        there = tmp_path / "other" / str(folder).lstrip("/")
        (there / "shard").write_bytes(b"abc")
        raise OSError("no space")
    assert not there.exists()
    with pytest.raises(RuntimeError, match="shard was written on two nodes, one of them 10.0.0.2"), storage.written(str(folder)):
        for place in (folder, there):
            (place / "shard").write_bytes(b"abc")


def test_folders_that_a_node_lacks_are_named(cluster: None, plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"megatron_training.tokenizer_name_or_path: node 10.0.0.2 lacks .*config.json, .* of .*, or has another version of it: copy "
        r"the folder there from 10.0.0.1, to the same path",
    ):
        storage_of(plan, [disk(tmp_path / "other")], "10.0.0.1")


def test_saves_that_a_node_does_not_see_ask_for_the_switch(cluster: None, plan: Plan, tmp_path: Path) -> None:
    other, model = tmp_path / "other", Path(plan.train.hf_path)
    copied = other / str(model).lstrip("/")
    copied.mkdir(parents=True)
    for file in model.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    with pytest.raises(
        ValueError,
        match=r"actor_config.save: what node 10.0.0.1 writes into .*/save isn't seen on 10.0.0.2: give a folder that all nodes share, or "
        r"set megatron_training.no_shared_storage=true; each save is then collected on 10.0.0.1",
    ):
        storage_of(plan, [disk(other)], "10.0.0.1")
    apart = replace(plan, run=replace(plan.run, no_shared_storage=True))
    assert [member.node for member in storage_of(apart, [disk(other)], "10.0.0.1").apart] == ["10.0.0.2"]
    assert storage_of(plan, [disk(Path("/"))], "10.0.0.1").apart == []
    assert list(Path(plan.run.save).iterdir()) == []


def test_a_training_save_is_brought_where_it_is_missing(cluster: None, plan: Plan, tmp_path: Path) -> None:
    other, save = tmp_path / "other", Path(plan.run.save) / "iter_0000002"
    (save / "actor").mkdir(parents=True)
    (save / "actor" / "__0_0.distcp").write_bytes(b"weights")
    (save / "state.json").write_text("{}")
    run = replace(plan.run, no_shared_storage=True, save=str(save.parent))
    resumed = replace(plan, run=run, train=replace(plan.train, hf_path=str(save / "actor"), load=str(save / "actor")))
    storage = storage_of(resumed, [disk(other)], "10.0.0.1")
    assert file_sizes(other / str(save / "actor").lstrip("/")) == {"__0_0.distcp": 7}
    storage.forget()
    assert file_sizes(other) == {}


def test_a_node_that_is_gone_is_named(cluster: None, tmp_path: Path) -> None:
    storage = two_nodes(tmp_path / "other")
    ray.kill(storage.disks[0].actor)
    with pytest.raises(WorkerFailed, match=r"storage process 0 died in storage of node 10.0.0.2"):
        storage.bring(str(tmp_path))
