"""Connections to one upstream: an exchange per request, and a pool of the idle ones.

A response is relayed as it comes: one read, one call of the receiver. Its framing is followed (never rebuilt), since
that is what tells where it ends, hence whether the connection can be used again and whether a response was cut.
"""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol, cast

from kvplane_runtime.proxy.http1 import ChunkedScanner, Framing, HeadReader, ProtocolError, Request, ResponseHead
from kvplane_runtime.proxy.http1 import request_bytes as request_head_bytes
from kvplane_runtime.proxy.limits import Limits

_JOINED_BYTES: Final = 64 * 1024


class UpstreamError(Exception):
    """An exchange failed.

    UpstreamError
    ├── UpstreamUnreachableError  no connection, nothing was sent
    ├── UpstreamClosedError       the connection ended before the response did
    ├── UpstreamGarbageError      what came is not HTTP, or not an answer to this request
    └── UpstreamSilentError       nothing came for ``Limits.silence_seconds``
    """


class UpstreamUnreachableError(UpstreamError):
    """No connection could be made: refused or timed out; nothing was sent."""


class UpstreamClosedError(UpstreamError):
    """The upstream closed before its response was complete; ``answered`` says whether any byte of it had come."""

    def __init__(self, message: str, *, answered: bool) -> None:
        super().__init__(message)
        self.answered = answered


class UpstreamGarbageError(UpstreamError):
    """The response broke HTTP."""


class UpstreamSilentError(UpstreamError):
    """The upstream sent nothing for too long."""


class Receiver(Protocol):
    """Where a response goes."""

    def response_head(self, head: ResponseHead) -> bool:
        """Takes the final head; returns whether a chunked body is to be decoded for it. May ``discard`` the answer."""

    def response_data(self, data: bytes, chunk: bytes = b"") -> None:
        """Takes the next bytes of the body, in the framing of the head (or decoded).

        ``chunk``: the whole chunk that decoded ``data`` came in, where it came so.
        """

    def response_begun(self) -> None:
        """What came together with the head was handed over, without a fault in it."""

    def response_end(self) -> None:
        """The body is complete."""


class UpstreamConnection(asyncio.Protocol):
    """One connection; at any time it serves one exchange or is idle."""

    def __init__(
        self, *, loop: asyncio.AbstractEventLoop, limits: Limits, on_lost: Callable[["UpstreamConnection"], None]
    ) -> None:
        self._loop = loop
        self._limits = limits
        self._on_lost = on_lost
        self._transport: asyncio.Transport
        self._done: asyncio.Future[None]
        self._relay: Callable[[bytes], None] | None = None
        """Takes what is read in the present state of the exchange; None while idle."""
        self._receiver: Receiver
        self._reader: HeadReader
        self._scanner: ChunkedScanner
        self._content = bytearray()
        self._method = b""
        self._left = 0
        self._answered = False
        self._paused = False
        self._keep = False
        self._last_heard = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.idle_since = 0.0

    def begin(self, request: Request, receiver: Receiver) -> None:
        """Sends ``request``; its response is relayed from now on. Raises UpstreamClosedError."""
        if self.closing:
            raise UpstreamClosedError("it closed the connection before the request was sent", answered=False)
        self._method = request.head.method
        self._receiver = receiver
        self._reader = self._new_reader()
        self._answered = self._keep = False
        self._done = self._loop.create_future()
        self._relay = self._relay_head
        self._last_heard = self._loop.time()
        self._timer = self._loop.call_later(self._limits.silence_seconds, self._check_silence)
        if len(request.body) <= _JOINED_BYTES:  # each write is a system call
            self._transport.write(request_head_bytes(request) + request.body)
        else:
            self._transport.write(request_head_bytes(request))
            self._transport.write(request.body)

    async def completed(self) -> None:
        """Returns when the response is complete.

        Raises UpstreamError. Cancelled, it aborts the connection. Afterwards ``reusable`` tells what to do with it.
        """
        try:
            await self._done
        finally:
            self._stop_timer()
            if self.reusable:
                self.resume_relay()
            else:
                self.abort()

    @property
    def reusable(self) -> bool:
        """Whether the last exchange left the connection clean and open."""
        at_rest = self._relay is None and self._transport.get_write_buffer_size() == 0
        return at_rest and self._keep and not self.closing

    @property
    def closing(self) -> bool:
        """Whether the connection is closed, or about to be."""
        return self._transport.is_closing()

    def abort(self) -> None:
        """Drops the connection at once; the receiver is not called again."""
        self._stop_timer()
        self._relay = None
        self._transport.abort()

    def discard(self) -> None:
        """The answer is not wanted: the exchange ends here, and the connection with it."""
        self._relay = None
        self._keep = False
        self._done.set_result(None)

    def pause_relay(self) -> None:
        """The receiver's buffer is full: read no more until ``resume_relay``."""
        if not self._paused and not self.closing:
            self._paused = True
            self._transport.pause_reading()

    def resume_relay(self) -> None:
        """The receiver has room again."""
        if self._paused and not self.closing:
            self._paused = False
            self._last_heard = self._loop.time()
            self._transport.resume_reading()

    # Called by the event loop.
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are such without being subclasses

    def data_received(self, data: bytes) -> None:
        if self._relay is None:
            # Bytes that nobody asked for would be taken for the next response: response splitting.
            self.abort()
            return
        self._last_heard = self._loop.time()
        self._answered = True
        try:
            self._relay(data)
        except ProtocolError as error:
            self._fail(UpstreamGarbageError(str(error)))

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost(self)
        if self._relay == self._relay_until_close and exc is None:
            self._finish(keep=False)
        elif self._relay is not None:
            self._fail(
                UpstreamClosedError("it closed the connection before its answer was complete", answered=self._answered)
            )

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _new_reader(self) -> HeadReader:
        return HeadReader(response=True, max_bytes=self._limits.max_head_bytes, max_fields=self._limits.max_fields)

    def _relay_head(self, data: bytes) -> None:
        while (end := self._reader.feed(data)) is not None:
            head = self._reader.response(method=self._method)
            data = data[end:]
            if head.status >= 200:
                self._start_body(head, data)
                return
            self._reader = self._new_reader()  # an interim response (100, 103): the final one follows
            if not data:
                return

    def _start_body(self, head: ResponseHead, data: bytes) -> None:
        self._keep = head.keep_alive
        decode = self._receiver.response_head(head)
        if self._relay is None:  # discarded
            return
        match head.framing:
            case Framing.NONE:
                self._left = 0
                self._relay = self._relay_counted
            case Framing.COUNTED:
                self._left = head.content_length
                self._relay = self._relay_counted
            case Framing.CHUNKED:
                self._scanner = ChunkedScanner(self._content if decode else None)
                self._relay = self._relay_decoded if decode else self._relay_chunked
            case Framing.UNTIL_CLOSE:
                self._relay = self._relay_until_close
        if data or (self._relay == self._relay_counted and not self._left):
            self._relay(data)
        self._receiver.response_begun()

    def _relay_counted(self, data: bytes) -> None:
        excess = len(data) - self._left
        if excess > 0:
            data = data[: self._left]
        self._left -= len(data)
        if data:
            self._receiver.response_data(data)
        if not self._left:
            self._finish(keep=excess <= 0)

    def _relay_chunked(self, data: bytes) -> None:
        end = self._scanner.feed(data)
        if end < len(data):
            self._receiver.response_data(data[:end])
            self._finish(keep=False)
            return
        self._receiver.response_data(data)
        if self._scanner.complete:
            self._finish(keep=True)

    def _relay_decoded(self, data: bytes) -> None:
        if content := self._scanner.single_chunk(data):
            self._receiver.response_data(content, data)
            return
        end = self._scanner.feed(data)
        if self._content:
            self._receiver.response_data(bytes(self._content))
            self._content.clear()
        if self._scanner.complete:
            self._finish(keep=end == len(data))

    def _relay_until_close(self, data: bytes) -> None:
        self._receiver.response_data(data)

    def _finish(self, *, keep: bool) -> None:
        self._keep = self._keep and keep
        self._relay = None
        self._receiver.response_end()
        if not self._done.done():
            self._done.set_result(None)

    def _fail(self, error: UpstreamError) -> None:
        self.abort()
        if not self._done.done():
            self._done.set_exception(error)

    def _check_silence(self) -> None:
        """Runs at most once per ``silence_seconds``, so that a chunk costs no timer."""
        now = self._loop.time()
        quiet_until = (now if self._paused else self._last_heard) + self._limits.silence_seconds
        if quiet_until > now:
            self._timer = self._loop.call_at(quiet_until, self._check_silence)
        else:
            self._fail(UpstreamSilentError(f"it sent nothing for {self._limits.silence_seconds:g} seconds"))


class UpstreamPool:
    """Makes connections to one address and keeps the idle ones, the youngest used first."""

    def __init__(self, *, host: str, port: int, limits: Limits) -> None:
        self._host = host
        self._port = port
        self._limits = limits
        self._idle: list[UpstreamConnection] = []

    def take_idle(self) -> UpstreamConnection | None:
        """An idle connection young enough that the upstream will not be closing it just now; None if there is none."""
        oldest = asyncio.get_running_loop().time() - self._limits.upstream_idle_seconds
        while self._idle:
            connection = self._idle.pop()
            if connection.idle_since > oldest and not connection.closing:
                return connection
            connection.abort()
        return None

    async def connect(self) -> UpstreamConnection:
        """A fresh connection; raises UpstreamUnreachableError."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._limits.connect_seconds):
                _, connection = await loop.create_connection(
                    lambda: UpstreamConnection(loop=loop, limits=self._limits, on_lost=self._forget),
                    self._host,
                    self._port,
                )
        except OSError as error:
            raise UpstreamUnreachableError(f"no connection to {self._host}:{self._port}: {error}") from error
        return connection

    def give_back(self, connection: UpstreamConnection) -> None:
        """After an exchange: keeps the connection if it can be used again."""
        if not connection.reusable:
            return
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle.append(connection)
        oldest = connection.idle_since - self._limits.upstream_idle_seconds
        while len(self._idle) > self._limits.max_idle_upstream or self._idle[0].idle_since < oldest:
            self._idle.pop(0).abort()

    def close(self) -> None:
        """Drops the idle connections."""
        while self._idle:
            self._idle.pop().abort()

    def _forget(self, connection: UpstreamConnection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)
