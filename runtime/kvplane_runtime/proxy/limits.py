"""Bounds of the proxy: sizes in bytes, times in seconds.

They are constants of the product, not user settings: each is far from what a well-behaved peer needs, and close enough
to keep a bad one from holding memory, connections or KV. Tests shrink them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What one proxy allows its clients and its upstream."""

    max_head_bytes: int = 32 * 1024
    """Start line and fields of one message; more is answered 431."""
    max_fields: int = 128
    max_held_bytes: int = 256 * 1024 * 1024
    """All request bodies that wait for their response together; beyond it requests are answered 503."""
    max_pipelined_bytes: int = 64 * 1024
    """Bytes of later requests kept while one is being served; beyond it the client is not read from."""
    write_buffer_bytes: int = 64 * 1024
    """Response bytes buffered for a slow client before its upstream is not read from."""

    header_seconds: float = 10
    """From the first byte of a request to the end of its head; then 408."""
    body_seconds: float = 120
    """From the end of the head to the end of the body; then 408."""
    keep_alive_seconds: float = 75
    """Longest silence between requests on one connection; then it is closed."""
    stall_seconds: float = 60
    """Longest time a client may not read a response that waits for it; then the connection is aborted."""
    linger_seconds: float = 2
    """After the last response a closing connection is read and discarded this long, so that a client still sending
    gets to read the answer instead of a reset."""

    connect_seconds: float = 10
    """Longest time to connect to the upstream; then 503. On one machine a connection needs no such time, but a busy one
    may take that long to run this process again; an upstream that is gone refuses at once."""
    silence_seconds: float = 600
    """Longest time the upstream may send nothing (a long completion that is not streamed sends nothing until its end);
    then 504, or a cut stream."""
    upstream_idle_seconds: float = 3
    """Oldest idle upstream connection that is used again; below the 5 s after which uvicorn, and so vLLM, closes it."""
    max_idle_upstream: int = 256
    """Idle upstream connections kept."""
