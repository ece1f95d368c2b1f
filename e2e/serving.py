"""The threads that the test servers (`hub.py`, `registry.py`) answer from."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def serve_threads(handler: type[BaseHTTPRequestHandler], *, host: str, port: int) -> Iterator[str]:
    """Serve while the body runs; yields `HOST:PORT`, the port the kernel's choice where `port` is 0."""
    server = ThreadingHTTPServer((host, port), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"{host}:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
