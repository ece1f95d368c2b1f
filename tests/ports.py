"""Ports for servers that bind them only after a while, as a process does that has to start first."""

import itertools
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

_WORKERS = 16
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS


def _share() -> Iterator[int]:
    """Ports below the kernel's own range, of which each process of the tests has some; again from the first after the last."""
    ephemeral = Path("/proc/sys/net/ipv4/ip_local_port_range")
    upper = int(ephemeral.read_text().split()[0]) if ephemeral.exists() else 32768
    ports = range(10000 + _WORKER, max(upper, 20000), _WORKERS)
    return itertools.cycle(random.sample(ports, len(ports)))


_PORTS = _share()


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens, and which nobody else is given soon.

    One that the kernel chooses it may choose for another socket as well, or for a client, until it is bound.
    """
    for port in itertools.islice(_PORTS, 1000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise OSError("There are no free ports on 127.0.0.1.")
