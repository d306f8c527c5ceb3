"""Where the processes of a parallel test meet."""

from __future__ import annotations

import socket


def free_address() -> str:
    """host:port that is free now; to be used at once."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"
