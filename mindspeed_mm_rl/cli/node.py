"""`mm-rl node`: what one machine does in a run on several. Settings come by the variables that examples/rl/scripts/launch.sh names."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mindspeed_mm_rl.platforms import env, network, processes, resources, signals
from mindspeed_mm_rl.trainer.guardian import Guardian
from mindspeed_mm_rl.workers.cluster import Head, RayNode, say, tell_all, wait_for_head, wait_for_machines, wait_for_outcome

_USER_ERROR = 2
_FOR_MACHINES, _FOR_THE_HEAD = 600, 40
"""Seconds. Machines may be started one by one; a wrong MASTER_ADDR should not take that long to be told."""
_WHOLE_CLUSTER_SECONDS = "30"
"""For the devices of machines that are all there."""
_INTERFACES = ("SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True)
class Settings:
    """As the user gave them. Example: Settings(num_nodes=2, master="node1", port=6766)."""

    num_nodes: int
    master: str
    port: int
    rank: int | None = None
    """NODE_RANK."""
    address: str = ""
    """CURRENT_IP."""
    interface: str = ""
    """SOCKET_IFNAME."""


@dataclass(frozen=True)
class Part:
    """Example: Part(is_head=True, address="10.0.0.1", head=Head("10.0.0.1", 6766))."""

    is_head: bool
    address: str
    """Of this machine, for the others."""
    head: Head


def run_node(command: Sequence[str]) -> int:
    """Returns the exit code of the run: on the head that of the command, elsewhere what the head tells."""
    settings = _settings()
    part = part_of(settings)
    _check_token()
    folder = Path(tempfile.mkdtemp(prefix="mm-rl-", dir=env.read("RAY_TMPDIR") or "/tmp"))
    with Guardian(None, "the launcher", processes.NODE_MARKER, str(folder)) as guardian:
        guardian.tell(session=str(folder))
        return _lead(part, folder, settings.num_nodes, command) if part.is_head else _join(part, folder)


def _settings() -> Settings:
    rank = env.read("NODE_RANK")
    return Settings(
        num_nodes=env.read_int("NNODES", 1),
        master=env.read("MASTER_ADDR"),
        port=env.read_int("RAY_PORT", 6766),
        rank=env.read_int("NODE_RANK", 0) if rank else None,
        address=env.read("CURRENT_IP"),
        interface=_interface(),
    )


def _interface() -> str:
    """Those of the libraries may also hold patterns; only the name of one interface says where this machine is."""
    given = {name: env.read(name) for name in _INTERFACES}
    return given["SOCKET_IFNAME"] or next((value for value in given.values() if value in network.by_interface()), "")


def part_of(settings: Settings) -> Part:
    """Head or not: by NODE_RANK, else by whose address MASTER_ADDR is. Raises ValueError for what can't work on several machines."""
    _check_master(settings)
    address = _own_address(settings)
    if settings.rank is None:
        is_head = _is_head_by_address(settings, address)
    elif not 0 <= settings.rank < settings.num_nodes:
        raise ValueError(
            f"NODE_RANK is {settings.rank}, but NNODES is {settings.num_nodes}: it counts the machines from 0, which is the head"
        )
    else:
        is_head = settings.rank == 0
    if is_head and not network.is_own(network.resolved(settings.master)):
        raise ValueError(
            f"NODE_RANK is 0, so this machine is the head, but MASTER_ADDR {settings.master} is no address of it ({_own_addresses()}); "
            "give the same MASTER_ADDR, that of the head, on all machines"
        )
    # The head's own name is often 127.0.1.1 to itself.
    return Part(is_head, address, Head(address if is_head else settings.master, settings.port))


def _check_master(settings: Settings) -> None:
    if not settings.master or network.is_loopback(settings.master):
        raise ValueError(
            f"MASTER_ADDR is {settings.master or 'not set'}, but NNODES is {settings.num_nodes}: give the address of the head, the first "
            "machine, as the others see it"
        )
    if ":" in settings.master:
        raise ValueError(f"MASTER_ADDR is {settings.master}: give an IPv4 address or a name, without a port (that is RAY_PORT)")
    if not 1024 <= settings.port <= 65535:
        raise ValueError(f"RAY_PORT is {settings.port}: give a port from 1024 to 65535")


def _own_address(settings: Settings) -> str:
    if settings.address:
        if settings.address in ("localhost", "127.0.0.1") or not network.is_own(network.resolved(settings.address)):
            raise ValueError(f"CURRENT_IP is {settings.address}, by which other machines can't reach this one ({_own_addresses()})")
        return network.resolved(settings.address)
    by_interface = network.by_interface()
    if settings.interface:
        if settings.interface not in by_interface:
            raise ValueError(
                f"SOCKET_IFNAME is {settings.interface}, which has no IPv4 address here ({_own_addresses()}): correct it, or set CURRENT_IP"
            )
        return by_interface[settings.interface]
    towards = network.source_towards(network.resolved(settings.master))
    found = next((address for address in (towards, *by_interface.values()) if address and not network.is_loopback(address)), None)
    if found is None:
        raise ValueError("no network interface of this machine has an IPv4 address: set CURRENT_IP")
    return found


def _is_head_by_address(settings: Settings, address: str) -> bool:
    master = network.resolved(settings.master)
    if master == address:
        return True
    if not network.is_own(master):
        return False
    if network.is_loopback(master):
        return True
    own = f"CURRENT_IP {settings.address}" if settings.address else f"SOCKET_IFNAME {settings.interface} ({address})"
    raise ValueError(
        f"MASTER_ADDR {settings.master} and {own} are both this machine's ({_own_addresses()}), but not the same address: make them one, "
        "or set NODE_RANK (0 for the head)"
    )


def _own_addresses() -> str:
    found = [f"{address} ({name})" for name, address in network.by_interface().items() if not network.is_loopback(address)]
    return ", ".join(found) or "no address"


def _check_token() -> None:
    """Whoever reaches Ray's port may run code on all machines."""
    env.set_all({"RAY_AUTH_MODE": env.read("RAY_AUTH_MODE", "token")})
    file = Path(env.read("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if env.read("RAY_AUTH_MODE") == "token" and not env.read("RAY_AUTH_TOKEN") and not file.is_file():
        raise ValueError(
            f"RAY_AUTH_MODE is token, but there is no {file}: make one on one machine (ray get-auth-token --generate) and copy it to the "
            "others; or set RAY_AUTH_MODE=disabled on all machines of a network that is yours alone"
        )


def _lead(part: Part, folder: Path, num_nodes: int, command: Sequence[str]) -> int:
    if not network.is_free(part.address, part.head.port):
        raise ValueError(
            f"port {part.head.port} of {part.address} is taken, perhaps by the head of another run: set RAY_PORT to a free one, the same "
            "on all machines"
        )
    say(f"this machine ({part.address}) is the head of {num_nodes}")
    # Nobody needs its server for clients; where its usual port is taken, by the head of another run, Ray ends.
    client_port = str(network.free_port(part.address))
    ports = ["--port", str(part.head.port), "--ray-client-server-port", client_port]
    ray_options = ["--head", *ports, "--include-dashboard", "false", *_devices()]
    with RayNode(folder, part.address, ray_options) as node:
        exit_code = _USER_ERROR
        try:
            wait_for_machines(node, part.head, num_nodes, env.read_int("WAIT_SECONDS", _FOR_MACHINES))
            env.set_all({"RAY_ADDRESS": str(part.head), "WAIT_SECONDS": _WHOLE_CLUSTER_SECONDS})
            exit_code = _run(command)
        except signals.StoppedBySignal as stop:
            exit_code = stop.exit_code
            raise
        finally:
            tell_all(node, part.head, exit_code)
    return exit_code


def _join(part: Part, folder: Path) -> int:
    say(f"this machine ({part.address}) joins the head at {part.head}")
    wait_for_head(part.head, env.read_int("WAIT_SECONDS", _FOR_THE_HEAD))
    address = f"{network.resolved(part.head.host)}:{part.head.port}"
    with RayNode(folder, part.address, ["--address", address, *_devices()]) as node:
        outcome = wait_for_outcome(node, part.head)
    say(f"the run at {part.head} is over" + (f": exit code {outcome}, its reason is told there" if outcome else ""))
    return outcome


def _devices() -> list[str]:
    """Options of `ray start`. Ray counts the devices itself where NPUS_PER_NODE doesn't say."""
    return resources.offered(resources.of_this_machine(), env.read_int("NPUS_PER_NODE", 0)) if env.read("NPUS_PER_NODE") else []


def _run(command: Sequence[str]) -> int:
    """Its exit code; a signal goes on to it and to all that it has in the foreground."""
    child = subprocess.Popen(command, start_new_session=True)
    try:
        return _exit_code(child.wait())
    except signals.StoppedBySignal as stop:
        os.killpg(child.pid, stop.exit_code - 128)
        # Told to stop while Python is still starting, it ends with some other code.
        return stop.exit_code if child.wait() else 0


def _exit_code(returned: int) -> int:
    """As a shell tells a death by a signal."""
    return returned if returned >= 0 else 128 - returned
