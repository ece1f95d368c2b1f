"""Ports for programs that have to be told theirs before they listen."""

import itertools
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

from e2e.cluster.errors import CommandError

_SHARES = 16
_MOST_TRIES = 1000


def free_ports(count: int, *, host: str = "127.0.0.1") -> list[int]:
    """Ports of ``host`` that nobody listens on, and that nobody else is given soon.

    They come from below the range that the kernel gives to clients: from within it an outgoing connection could take one in
    the time until the program binds it that it is meant for.
    """
    found: list[int] = []
    for port in itertools.islice(_PORTS, _MOST_TRIES):
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise CommandError(f"There are no free ports on {host}: close some of the programs that listen there.")


def _share(worker: str) -> Iterator[int]:
    """Each process of the tests has its own part of the ports, and begins again only after the last."""
    ephemeral = Path("/proc/sys/net/ipv4/ip_local_port_range")
    upper = int(ephemeral.read_text().split()[0]) if ephemeral.exists() else 32768
    part = int(worker.removeprefix("gw")) if worker else os.getpid()
    ports = range(10000 + part % _SHARES, max(upper, 20000), _SHARES)
    return itertools.cycle(random.sample(ports, len(ports)))


_PORTS = _share(os.environ.get("PYTEST_XDIST_WORKER", ""))
