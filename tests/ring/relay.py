"""A TCP relay on loopback between a rank and rank 0's control port: the rank's network, as slow as a test wants it, or cut."""

import contextlib
import math
import socket
import threading
import time
from queue import SimpleQueue

HOST = "127.0.0.1"
_POLL_SECONDS = 0.01


class Relay:
    """Passes on what comes after ``delay`` seconds; while it is infinite, nothing, not even that a connection has ended."""

    def __init__(self, to: int) -> None:
        self.delay = 0.0
        self._to = to
        self._over = False
        self._server = socket.create_server((HOST, 0))
        self._ends: list[socket.socket] = []
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self.delay = math.inf

    def mend(self) -> None:
        self.delay = 0.0

    def close(self) -> None:
        self._over = True
        for end in (self._server, *self._ends):
            _shut(end)
            end.close()

    def _accept(self) -> None:
        while not self._over:
            try:
                near, _ = self._server.accept()
            except OSError:  # it was closed
                return
            self._ends.append(near)
            try:
                far = socket.create_connection((HOST, self._to))
            except OSError:  # rank 0 is not there
                _shut(near)
                continue
            self._ends.append(far)
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        """One direction. What is late holds up nothing but itself: it is latency, not a narrow link."""
        came: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
        threading.Thread(target=_read, args=(source, came), daemon=True).start()
        with contextlib.suppress(OSError):
            while True:
                at, data = came.get()
                while (
                    wait := at + self.delay - time.monotonic()
                ) > 0 and not self._over:  # the delay may change meanwhile
                    time.sleep(min(wait, _POLL_SECONDS))
                if not data or self._over:
                    break
                sink.sendall(data)
        _shut(source)
        _shut(sink)


def _read(source: socket.socket, came: "SimpleQueue[tuple[float, bytes]]") -> None:
    data = b"some"
    while data:
        try:
            data = source.recv(65536)
        except OSError:
            data = b""
        came.put((time.monotonic(), data))


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
