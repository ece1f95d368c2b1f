"""Ends an engine that loads, when its pod is to go.

SIGTERM does not end it for sure. vLLM (0.32) has no handler for most of its start; one that comes between its two
processes' handshake is swallowed, and both wait for each other for good. The pod would stay for its whole grace period
with its GPU. An engine that does not listen yet serves nobody, so there is nothing to end in order.

The containers of the pod share their process namespace (docs/decisions/0010), and the user.
"""

import logging
import os
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

_OUTSIDE: Final = 0
"""Parent of a container's first process, as the namespace shows it."""


def end_engine(*, port: int, proc: Path = Path("/proc"), kill: Callable[[int, int], None] = os.kill) -> None:
    """Kills the first process of the container whose command line asks for this port; with it goes the container."""
    for pid in _first_processes(proc):
        if _asks_for(port, _read(proc / str(pid) / "cmdline")):
            try:
                kill(pid, signal.SIGKILL)
            except OSError as error:
                log.warning("The engine, process %d, could not be ended while it loads: %s.", pid, error)
            else:
                log.info("The engine was ended while it loaded.")
            return


def _first_processes(proc: Path) -> list[int]:
    """Processes that no other one of the namespace has started, but for the one that holds the namespace."""
    found = (int(entry.name) for entry in proc.iterdir() if entry.name.isdigit())
    return sorted(pid for pid in found if pid != 1 and _parent(_read(proc / str(pid) / "status")) == _OUTSIDE)


def _parent(status: bytes) -> int | None:
    """None: the process is gone."""
    lines = [line for line in status.splitlines() if line.startswith(b"PPid:")]
    return int(lines[0].split()[1]) if lines else None


def _asks_for(port: int, command: bytes) -> bool:
    words = command.split(b"\0")
    return (b"--port", str(port).encode()) in pairwise(words)


def _read(path: Path) -> bytes:
    """Empty where the process has gone meanwhile."""
    try:
        return path.read_bytes()
    except OSError:
        return b""
