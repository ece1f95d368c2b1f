"""Ports for servers that bind them only after a while, as a process does that has to start first."""

import os
import random
import socket
from pathlib import Path

_WORKERS = 16
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens, and which nobody else is given meanwhile.

    The kernel gives those of its own range to any socket that asks for none, and to clients; so it is one from below, and of
    the share of this process of the tests.
    """
    ephemeral = Path("/proc/sys/net/ipv4/ip_local_port_range")
    upper = int(ephemeral.read_text().split()[0]) if ephemeral.exists() else 32768
    share = range(10000 + _WORKER, max(upper, 11000), _WORKERS)
    for port in random.sample(share, len(share)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise OSError("There are no free ports on 127.0.0.1.")
