"""Addresses of this machine and of others (IPv4, Linux)."""

from __future__ import annotations

import fcntl
import ipaddress
import random
import socket
import struct

_GET_INTERFACE_ADDRESS = 0x8915
"""SIOCGIFADDR, see netdevice(7)."""
_NAME_BYTES = 15
_ANY_PORT = 9
"""Nothing is sent: connecting a datagram socket only asks for the route."""
_QUIET_PORTS = range(20000, 32000)
"""Above those of Ray's workers, below those of outgoing connections, one of which might come before the listener."""


def by_interface() -> dict[str, str]:
    """The first address of every interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        for _, name in socket.if_nameindex():
            try:
                request = struct.pack("256s", name[:_NAME_BYTES].encode())
                found[name] = socket.inet_ntoa(fcntl.ioctl(asker.fileno(), _GET_INTERFACE_ADDRESS, request)[20:24])
            except OSError:
                continue
    return found


def resolved(host: str) -> str:
    """The address of a name. Raises ValueError for a name that has none here."""
    try:
        return socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise ValueError(f"{host} has no IPv4 address here ({error.strerror})") from error


def is_loopback(host: str) -> bool:
    """Whether every machine would take this for itself, as it stands; a name isn't looked up."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.partition(".")[0] == "localhost"
    return address.is_loopback or address.is_unspecified


def source_towards(address: str) -> str:
    """This machine's own address on its way to another one; empty where there is no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        try:
            asker.connect((address, _ANY_PORT))
        except OSError:
            return ""
        return asker.getsockname()[0]


def is_own(address: str) -> bool:
    """Whether an address is this machine's. Binding to it would not tell: some machines may bind to addresses that are not theirs."""
    source = source_towards(address)
    return bool(source) and (source == address or (is_loopback(source) and is_loopback(address)))


def is_free(address: str, port: int) -> bool:
    """Whether somebody may listen there."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        # As Ray does: connections of a run that has just ended don't count.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
            listener.listen(1)
        except OSError:
            return False
    return True


def free_port(address: str) -> int:
    """Where somebody may listen. Raises OSError where there is none."""
    # Not the random state of the program, which runs with the same seed share.
    for port in random.SystemRandom().sample(_QUIET_PORTS, len(_QUIET_PORTS)):
        if is_free(address, port):
            return port
    raise OSError(f"no port from {_QUIET_PORTS[0]} to {_QUIET_PORTS[-1]} of {address} is free")


def unreachable(host: str, port: int, within_seconds: float) -> str:
    """Why no connection can be made, in words; empty when one can."""
    try:
        with socket.create_connection((host, port), timeout=within_seconds):
            return ""
    except socket.gaierror:
        return f"{host} is a name without an address here"
    except ConnectionRefusedError:
        return f"a machine answers at {host}, but nothing listens at port {port}"
    except OSError as error:
        return f"no machine answers at {host} ({error.strerror or 'no answer in time'})"
