"""Which part a machine has in a run on several, and what can't work."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import pytest

from mindspeed_mm_rl.cli.node import Part, Settings, part_of
from mindspeed_mm_rl.platforms import network, processes
from mindspeed_mm_rl.workers import placement
from mindspeed_mm_rl.workers.cluster import Head, wait_for_head
from tests.addresses import free_address
from tests.plans import run_plan
from tests.two_machines import SECOND, own_address

FOREIGN = "203.0.113.5"
"""Kept for documents (RFC 5737): no machine has it."""


def settings(**given: object) -> Settings:
    return Settings(**({"num_nodes": 2, "master": own_address(), "port": 6766} | given))


def test_the_machine_whose_address_is_given_is_the_head() -> None:
    own = own_address()
    head = Part(True, own, Head(own, 6766))
    assert part_of(settings()) == part_of(settings(address=own)) == part_of(settings(address=own, rank=0)) == head
    assert part_of(settings(interface=next(name for name, address in network.by_interface().items() if address == own))) == head
    assert not part_of(settings(master=FOREIGN, address=own)).is_head


def test_the_rank_decides_where_it_is_given() -> None:
    own = own_address()
    assert part_of(settings(address=SECOND, rank=1)) == Part(False, SECOND, Head(own, 6766))
    assert not part_of(settings(rank=1)).is_head


def test_the_head_by_its_own_name_has_an_address_for_others() -> None:
    try:
        network.resolved(socket.gethostname())
    except ValueError:
        pytest.skip("this machine doesn't know its own name")
    assert part_of(settings(master=socket.gethostname())) == Part(True, own_address(), Head(own_address(), 6766))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"master": "localhost"}, "MASTER_ADDR is localhost, but NNODES is 2: give the address of the head"),
        ({"master": "127.0.0.1"}, "MASTER_ADDR is 127.0.0.1, but NNODES is 2"),
        ({"master": "0.0.0.0"}, "MASTER_ADDR is 0.0.0.0, but NNODES is 2"),
        ({"master": "::1"}, "MASTER_ADDR is ::1, but NNODES is 2"),
        ({"master": ""}, "MASTER_ADDR is not set, but NNODES is 2"),
        ({"master": "fd00::2"}, "MASTER_ADDR is fd00::2: give an IPv4 address or a name, without a port"),
        ({"master": "10.0.0.1:6766"}, "MASTER_ADDR is 10.0.0.1:6766: give an IPv4 address or a name, without a port"),
        ({"master": "no-such-machine.invalid"}, "no-such-machine.invalid has no IPv4 address here"),
        ({"port": 80}, "RAY_PORT is 80: give a port from 1024 to 65535"),
        ({"rank": 2}, "NODE_RANK is 2, but NNODES is 2: it counts the machines from 0, which is the head"),
        ({"rank": 0, "master": FOREIGN, "address": SECOND}, f"this machine is the head, but MASTER_ADDR {FOREIGN} is no address of it"),
        ({"address": "localhost"}, "CURRENT_IP is localhost, by which other machines can't reach this one"),
        ({"address": FOREIGN}, f"CURRENT_IP is {FOREIGN}, by which other machines can't reach this one"),
        ({"address": SECOND}, f"and CURRENT_IP {SECOND} are both this machine's"),
        ({"interface": "nowhere0"}, "SOCKET_IFNAME is nowhere0, which has no IPv4 address here"),
    ],
)
def test_what_can_not_work_is_told_at_once(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        part_of(settings(**given))
    assert message in str(refused.value)


def test_a_head_that_does_not_come_is_told_with_what_was_found() -> None:
    host, _, port = free_address().rpartition(":")
    with pytest.raises(ValueError, match=f"within 0 s: a machine answers at {host}, but nothing listens at port {port}"):
        wait_for_head(Head(host, int(port)), 0.0)
    with pytest.raises(ValueError, match="no-such-machine.invalid is a name without an address here"):
        wait_for_head(Head("no-such-machine.invalid", 6766), 0.0)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://10.0.0.1:10001", "RAY_ADDRESS is ray://10.0.0.1:10001: give host:port of the head, and start the run on a machine of the"),
        (free_address(), "a machine answers at 127.0.0.1, but nothing listens at port .*; correct it, or unset it"),
        ("nonsense", "RAY_ADDRESS is nonsense, and Ray can't join it: "),
    ],
)
def test_a_cluster_that_is_not_there_is_told_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str, message: str) -> None:
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_UV_RUN_RUNTIME_ENV", *processes.PROCESS_ENV):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=message):
        placement.start(run_plan(tmp_path))


@pytest.mark.parametrize(
    ("length", "address", "message"),
    [
        (60, "", r"has 60 characters, and the sockets of Ray in it allow \d\d: set RAY_TMPDIR to a folder with a shorter one"),
        (76, "10.0.0.1:6379", "has 76 characters, and the sockets of the writers of saves in it allow 75: set TMPDIR to a folder"),
    ],
)
def test_a_temporary_folder_whose_path_is_too_long_for_sockets_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, length: int, address: str, message: str
) -> None:
    folder = "/".ljust(length, "t")
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", folder)
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(tempfile, "tempdir", folder)
    with pytest.raises(ValueError, match=message):
        placement.start(run_plan(tmp_path))
