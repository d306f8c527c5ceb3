"""Where the processes of a parallel test meet."""

from __future__ import annotations

import random
import socket

_PORTS = range(20000, 32000)
"""Below those of outgoing connections, which would be taken between the search and the use, and above those of Ray."""


def free_address() -> str:
    """host:port that is free now."""
    # Not the random state that tests seed: two of them would ask for the same ports.
    for port in random.SystemRandom().sample(_PORTS, 100):
        try:
            with socket.create_server(("127.0.0.1", port)):
                return f"127.0.0.1:{port}"
        except OSError:
            continue
    raise RuntimeError(f"none of 100 ports of {_PORTS} is free")
