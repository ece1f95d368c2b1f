"""Ports for programs that have to be told theirs before they listen."""

import random
import socket
from pathlib import Path

from e2e.cluster.errors import CommandError


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on, from below the range that the kernel gives to clients.

    From within that range an outgoing connection could take one in the time until the program binds it that it is meant for.
    """
    ephemeral = Path("/proc/sys/net/ipv4/ip_local_port_range")
    upper = int(ephemeral.read_text().split()[0]) if ephemeral.exists() else 32768
    found: list[int] = []
    for port in random.sample(range(10000, max(upper, 11000)), 500):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise CommandError("There are no free ports on 127.0.0.1: close some of the programs that listen there.")
