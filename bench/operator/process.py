"""A controller as a process: started, killed, and weighed by what /proc says of it."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class Process:
    """One controller; it can be started again after its end."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], *, log: Path) -> None:
        self._command, self._environment, self._log = tuple(command), dict(environment), log
        self._running: subprocess.Popen[bytes] | None = None

    def start(self, **environment: str) -> None:
        """Start it; ``environment`` adds to, or replaces, what every start has."""
        with self._log.open("ab") as log:
            self._running = subprocess.Popen(
                self._command,
                env={**os.environ, **self._environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        """kill -9; returns when it is gone. Nothing happens where it does not run."""
        if self._running is not None:
            self._running.send_signal(signal.SIGKILL)
            self._running.wait()
            self._running = None

    def check(self) -> None:
        """Raise RuntimeError, with the end of its log, if it ended by itself."""
        if self._running is None or self._running.poll() is not None:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"The controller ended by itself; the end of {self._log}:\n{tail}")

    def rss_mb(self) -> float:
        """Resident memory in MB (10^6 bytes)."""
        status = Path(f"/proc/{self._pid()}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:")) * 1024 / 1e6

    def cpu_seconds(self) -> float:
        """CPU time, user and system, since it was started."""
        fields = Path(f"/proc/{self._pid()}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND

    def _pid(self) -> int:
        self.check()
        assert self._running is not None
        return self._running.pid
