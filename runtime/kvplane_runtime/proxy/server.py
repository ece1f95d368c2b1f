"""The client side: connections, the life of a request, and the listener.

A connection is in one of four states: reading a head, reading a body, serving (the exchange runs), lingering (the last
answer is out; what still comes is discarded). One request is served at a time; pipelined ones wait in order.

A client that closes its sending side is taken for gone: after a disconnect the kernel shows exactly the same, and
an engine must not go on generating for nobody. A client must therefore keep its side open until it has its answer.
"""

import asyncio
import enum
import gc
import logging
import re
import resource
import secrets
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final, cast

from kvplane_runtime.proxy import answers
from kvplane_runtime.proxy.gate import Again, End, Gate, Meter, Refusal, Relay, Ticket
from kvplane_runtime.proxy.http1 import (
    ChunkedScanner,
    Framing,
    HeadReader,
    ProtocolError,
    Request,
    RequestHead,
    ResponseHead,
    response_bytes,
)
from kvplane_runtime.proxy.limits import Limits
from kvplane_runtime.proxy.upstream import (
    UpstreamClosedError,
    UpstreamConnection,
    UpstreamError,
    UpstreamPool,
    UpstreamSilentError,
    UpstreamUnreachableError,
)

log = logging.getLogger(__name__)

_REQUEST_ID: Final = re.compile(rb"[\x21-\x7e]{1,128}")
_PROCESS: Final = secrets.token_hex(8).encode()
_NUMBERS: Final = count()
_COPIED_BYTES: Final = 64 * 1024
_REPEATABLE: Final = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"))
"""Idempotent methods (RFC 9110, 9.2.2): sending one twice does no more than sending it once."""


def _own_request_id() -> bytes:
    """Of a request that came without one. Unlike all others, and not to be kept secret, so that one draw of chance is enough."""
    return b"%b%016x" % (_PROCESS, next(_NUMBERS))


@dataclass(slots=True)
class ProxyStats:
    """Counts since start; read by whoever exports them."""

    responses: Counter[tuple[int, str]] = field(default_factory=Counter)
    """By status and by who answered, ``engine`` or ``proxy``."""
    client_disconnects: int = 0
    """Requests whose client went away, or stopped reading, before the answer was complete."""
    cut_responses: int = 0
    """Responses that the upstream broke off after their head was passed on."""
    retries: int = 0
    """Requests sent again because an idle upstream connection turned out to be closed."""


class Proxy:
    """Accepts clients and passes their requests through one gate to one upstream."""

    def __init__(
        self, *, gate: Gate, upstream: UpstreamPool, limits: Limits, max_body_bytes: Callable[[], int]
    ) -> None:
        self.gate = gate
        self.upstream = upstream
        self.limits = limits
        self.max_body_bytes = max_body_bytes
        self.stats = ProxyStats()
        self.held_bytes = 0
        """Bytes of request bodies held now."""
        self.closing = False
        self.connections: set[ClientConnection] = set()
        self._server: asyncio.Server | None = None

    async def listen(self, *, host: str | None, port: int) -> Sequence[socket.socket]:
        """Starts accepting; ``host`` None is every address of both families. Returns the listening sockets."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: ClientConnection(self, loop), host, port, backlog=1024)
        return self._server.sockets

    def stop_accepting(self) -> None:
        """No new connections; idle ones are closed, the others after the request they serve."""
        self.closing = True
        if self._server is not None:
            self._server.close()
        self.close_idle()

    def close_idle(self) -> None:
        """Closes the connections on which no request has begun: their clients come back on new ones."""
        for connection in tuple(self.connections):
            connection.close_if_idle()

    def abort(self) -> None:
        """Drops every connection."""
        for connection in tuple(self.connections):
            connection.abort()
        self.upstream.close()


def prepare_process() -> None:
    """Once, before anything is served: room for many streams, and no pauses for what they leave behind.

    A streamed request has two descriptors, so that the common soft limit of 1,024 would be reached at 500 of them. A
    collection of cycles stops every stream for as long as it takes; requests leave no cycles, so it need not come often, and
    need not look at what is there now and stays.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


class _State(enum.Enum):
    HEAD = enum.auto()
    BODY = enum.auto()
    SERVING = enum.auto()
    LINGERING = enum.auto()


class ClientConnection(asyncio.Protocol):
    """One client; also the receiver of the responses to its requests."""

    def __init__(self, proxy: Proxy, loop: asyncio.AbstractEventLoop) -> None:
        self._proxy = proxy
        self._limits = proxy.limits
        self._loop = loop
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._state = _State.HEAD
        self._reader = self._new_reader()
        self._timing_head = False
        self._waiting = b""
        """Bytes of later requests that came while one is being served."""
        self._unread = False
        """Whether reading is paused, because ``_waiting`` is full."""
        self._head: RequestHead | None = None
        self._request_id = b""
        self._body = bytearray()
        self._body_scanner: ChunkedScanner | None = None
        self._held = 0
        self._ticket: Ticket | None = None
        self._task: asyncio.Task[None] | None = None
        self._upstream: UpstreamConnection | None = None
        self._write_paused = False
        self._responding = False
        """Whether the head of the upstream's response was passed on."""
        self._meter: Meter | None = None
        """Reads the body of the response that is passed on."""
        self._answer: ResponseHead | None = None
        """The head of the upstream's response until it is written, with the first bytes of the body where they came with
        it: a write is a system call, and as long as nothing was written a fault can still be answered."""
        self._chunking = False
        """Whether that body is put into chunks here, its own framing being removed before the meter."""
        self._dropped: Again | Refusal | None = None
        """What the ticket said of an answer that is not passed on."""
        self._completed = False
        """Whether the response was passed on whole."""
        self._ends_at_close = False
        """Whether the client can tell the end of that response only by the end of the connection."""
        self._last = False
        """Whether the connection closes after the response being sent."""

    # Called by the event loop.
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are such without being subclasses
        self._transport.set_write_buffer_limits(high=self._limits.write_buffer_bytes)
        # A client whose machine vanished sends no FIN: unacknowledged bytes are what tells.
        transport.get_extra_info("socket").setsockopt(
            socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._limits.stall_seconds * 1000)
        )
        self._proxy.connections.add(self)
        self._arm(self._limits.keep_alive_seconds, self._idle_too_long)

    def data_received(self, data: bytes) -> None:
        if self._state is _State.SERVING:
            self._waiting += data
            if len(self._waiting) > self._limits.max_pipelined_bytes and not self._unread:
                self._unread = True
                self._transport.pause_reading()
        elif self._state is not _State.LINGERING:
            self._consume(data)

    def eof_received(self) -> None:
        if self._state is _State.SERVING:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._proxy.connections.discard(self)
        self._disarm()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        if self._state is _State.SERVING:
            self._proxy.stats.client_disconnects += 1
        self._state = _State.LINGERING
        if self._upstream is not None:
            self._upstream.abort()
            self._upstream = None
        if self._task is not None:
            self._task.cancel()  # which may not have begun yet
        self._leave(End.ABANDONED)

    def pause_writing(self) -> None:
        self._write_paused = True
        if self._upstream is not None:
            self._upstream.pause_relay()
        self._stall_timer = self._loop.call_later(self._limits.stall_seconds, self.abort)

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        if self._upstream is not None:
            self._upstream.resume_relay()

    # Called by the proxy.
    def close_if_idle(self) -> None:
        """Closes a connection on which no request has begun."""
        if self._state is _State.HEAD and not self._timing_head:
            self._transport.close()

    def abort(self) -> None:
        """Drops the connection and what is being served on it."""
        self._transport.abort()

    # Reading a request.
    def _new_reader(self) -> HeadReader:
        return HeadReader(response=False, max_bytes=self._limits.max_head_bytes, max_fields=self._limits.max_fields)

    def _consume(self, data: bytes) -> None:
        try:
            while data:
                if self._state is _State.HEAD:
                    if not self._timing_head:
                        self._timing_head = True
                        self._arm(self._limits.header_seconds, self._head_too_slow)
                    end = self._reader.feed(data)
                    if end is None:
                        return
                    data = data[end:]
                    self._start_request(self._reader.request())
                elif self._state is _State.BODY:
                    data = data[self._take_body(data) :]
                else:
                    if self._state is _State.SERVING:
                        self.data_received(data)
                    return
        except ProtocolError as error:
            self._refuse(answers.from_protocol_error(error), body_read=False)

    def _start_request(self, head: RequestHead) -> None:
        self._head = head
        given = head.value(b"x-request-id")
        self._request_id = given if given and _REQUEST_ID.fullmatch(given) else _own_request_id()
        has_body = head.chunked or head.content_length > 0
        if head.content_length > self._proxy.max_body_bytes():
            self._refuse(answers.body_too_large(self._proxy.max_body_bytes()), body_read=False)
            return
        entered = self._proxy.gate.enter(head)
        if isinstance(entered, Refusal):
            self._refuse(entered, body_read=not has_body)
            return
        self._ticket = entered
        if not has_body:
            self._serve_now()
            return
        self._state = _State.BODY
        self._body_scanner = ChunkedScanner(self._body) if head.chunked else None
        self._arm(self._limits.body_seconds, self._body_too_slow)
        if head.expects_continue:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _take_body(self, data: bytes) -> int:
        """Takes what belongs to the body; returns the offset behind it in ``data``."""
        assert self._head is not None  # noqa: S101  (a body follows a head)
        if self._body_scanner is not None:
            end = self._body_scanner.feed(data)
            complete = self._body_scanner.complete
        else:
            end = min(len(data), self._head.content_length - len(self._body))
            self._body += data[:end]
            complete = len(self._body) == self._head.content_length
        grown = len(self._body) - self._held
        self._held += grown
        self._proxy.held_bytes += grown
        limit = self._proxy.max_body_bytes()
        if self._body_scanner is not None and len(self._body) > limit:
            self._refuse(answers.body_too_large(limit), body_read=False)
        elif self._proxy.held_bytes > self._limits.max_held_bytes:
            self._refuse(answers.buffers_full(), body_read=False)
        elif complete:
            self._serve_now()
        return end

    # Serving it.
    def _serve_now(self) -> None:
        assert self._head is not None and self._ticket is not None  # noqa: S101  (only an entered request is served)
        self._disarm()
        self._state = _State.SERVING
        body, self._body = self._body, bytearray()
        request = Request(self._head, self._request_id, bytes(body) if len(body) < _COPIED_BYTES else body)
        admitted = self._ticket.admit_now(request)
        begun = None
        if isinstance(admitted, Request) and (begun := self._proxy.upstream.take_idle()) is not None:
            self._begin(begun, admitted)
        self._task = self._loop.create_task(self._serve(request, self._ticket, admitted, begun))
        self._task.add_done_callback(self._served)

    async def _serve(
        self, request: Request, ticket: Ticket, admitted: Request | Refusal | None, begun: UpstreamConnection | None
    ) -> None:
        """From what was decided, and sent, at once to the end of the answer."""
        while True:
            if admitted is None:
                admitted = await ticket.admit(request)
            outcome = admitted if isinstance(admitted, Refusal) else await self._forward(admitted, begun)
            if not isinstance(outcome, Again):
                break
            admitted = begun = None
        self._task = None
        if outcome is not None:
            self._refuse(outcome, body_read=True)
        else:
            self._end_request()

    def _served(self, task: asyncio.Task[None]) -> None:
        """A request whose handling failed by our own fault must neither leak nor hang."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error(
                "Serving request %s failed; its connection is dropped.", self._request_id.decode(), exc_info=error
            )
            self.abort()

    async def _forward(self, request: Request, begun: UpstreamConnection | None) -> Refusal | Again | None:
        """Sends the request, unless it was sent, and relays the response; returns what to do if there is none to relay."""
        pool = self._proxy.upstream
        idle = begun or pool.take_idle()
        try:
            try:
                if begun is not None:
                    await self._relayed(begun)
                else:
                    await self._exchange(idle or await pool.connect(), request)
            except UpstreamClosedError as error:
                # A reused connection that closes without a byte was most likely closed before the request reached it,
                # but only an idempotent request may be sent on that guess.
                if idle is None or error.answered or request.head.method not in _REPEATABLE:
                    raise
                self._proxy.stats.retries += 1
                await self._exchange(await pool.connect(), request)
        except UpstreamError as error:
            return self._failed(error)
        return self._dropped

    async def _exchange(self, connection: UpstreamConnection, request: Request) -> None:
        self._begin(connection, request)
        await self._relayed(connection)

    def _begin(self, connection: UpstreamConnection, request: Request) -> None:
        connection.begin(request, self)
        self._dropped = None
        self._upstream = connection
        if self._write_paused:
            connection.pause_relay()

    async def _relayed(self, connection: UpstreamConnection) -> None:
        try:
            await connection.completed()
        finally:
            self._upstream = None
            self._proxy.upstream.give_back(connection)

    def _failed(self, error: UpstreamError) -> Refusal | None:
        if self._responding:
            # Too late for an error answer. The missing end (of the chunks, of the counted bytes) tells the client.
            log.warning("The response to request %s was cut: %s.", self._request_id.decode(), error)
            self._proxy.stats.cut_responses += 1
            self._last = True
            if self._ends_at_close:
                self.abort()
            return None
        match error:
            case UpstreamUnreachableError():
                return answers.unreachable()
            case UpstreamSilentError():
                return answers.gateway_timeout(self._limits.silence_seconds)
            case _:
                return answers.bad_gateway(str(error).rstrip("."))

    # Called by the upstream connection.
    def response_head(self, head: ResponseHead) -> bool:
        assert self._head is not None and self._ticket is not None  # noqa: S101  (there is a request to answer)
        verdict = self._ticket.answered(head)
        if not isinstance(verdict, Relay):
            assert self._upstream is not None  # noqa: S101  (it calls this)
            self._dropped = verdict
            self._upstream.discard()
            return False
        unframed = head.framing is Framing.CHUNKED and self._head.version == "1.0"
        self._answer = head
        self._meter = verdict.meter
        self._chunking = head.framing is Framing.CHUNKED and not unframed and self._meter is not None
        self._ends_at_close = unframed or head.framing is Framing.UNTIL_CLOSE
        return unframed or self._chunking

    def response_data(self, data: bytes, chunk: bytes = b"") -> None:
        if self._meter is not None:
            passed = self._meter.feed(data)
            if not self._chunking or not passed:
                data = passed
            elif chunk and passed is data:
                data = chunk
            else:
                data = b"%x\r\n%b\r\n" % (len(passed), passed)
        if self._answer is not None:
            data = self._take_head(self._answer) + data
        if data:
            self._transport.write(data)

    def response_begun(self) -> None:
        if self._answer is not None:
            self._transport.write(self._take_head(self._answer))

    def response_end(self) -> None:
        rest = b""
        if self._meter is not None:
            rest = self._meter.finish()
            if self._chunking:
                rest = b"%x\r\n%b\r\n0\r\n\r\n" % (len(rest), rest) if rest else b"0\r\n\r\n"
        if self._answer is not None:
            rest = self._take_head(self._answer) + rest
        if rest:
            self._transport.write(rest)
        self._completed = True

    def _take_head(self, answer: ResponseHead) -> bytes:
        assert self._head is not None  # noqa: S101  (there is a request to answer)
        self._answer = None
        self._responding = True
        self._release_body()
        self._proxy.stats.responses[answer.status, "engine"] += 1
        self._last = self._ends_at_close or self._closes_after(self._head)
        return response_bytes(
            answer,
            request_id=self._request_id,
            chunked=answer.framing is Framing.CHUNKED and self._head.version == "1.1",
            connection=self._connection_field(self._head),
        )

    # Ending it.
    def _closes_after(self, head: RequestHead) -> bool:
        leaving = self._ticket is not None and self._ticket.last_on_connection
        return leaving or self._proxy.closing or not head.keep_alive

    def _connection_field(self, head: RequestHead) -> bytes | None:
        if self._last:
            return b"close"
        return b"keep-alive" if head.version == "1.0" else None

    def _refuse(self, refusal: Refusal, *, body_read: bool) -> None:
        """Answers with an error. Unless the body was read the connection ends, as its next bytes are not a request."""
        head = self._head
        self._last = not body_read or head is None or self._closes_after(head)
        self._proxy.stats.responses[refusal.status, "proxy"] += 1
        self._transport.write(
            answers.error_response(
                refusal,
                request_id=self._request_id or _own_request_id(),
                close=self._last,
                head_only=head is not None and head.method == b"HEAD",
            )
        )
        self._end_request()

    def _end_request(self) -> None:
        """The response is out: on to the next request, or to the end of the connection.

        Which also comes where it was not announced, for a drain that has begun since the head of the response went out.
        """
        self._last = self._last or (self._ticket is not None and self._ticket.last_on_connection)
        self._leave(End.UNSERVED)
        self._body_scanner = None
        self._head = None
        self._request_id = b""
        self._meter = None
        self._answer = None
        self._responding = False
        self._completed = False
        self._timing_head = False
        if self._last or self._transport.is_closing():
            self._linger()
            return
        self._state = _State.HEAD
        self._reader = self._new_reader()
        self._arm(self._limits.keep_alive_seconds, self._idle_too_long)
        if self._unread:
            self._unread = False
            self._transport.resume_reading()
        waiting, self._waiting = self._waiting, b""
        self._consume(waiting)

    def _linger(self) -> None:
        self._state = _State.LINGERING
        self._waiting = b""
        if self._transport.is_closing():
            return
        if self._unread:
            self._unread = False
            self._transport.resume_reading()
        self._transport.write_eof()
        self._arm(self._limits.linger_seconds, self._linger_on)

    def _leave(self, otherwise: End) -> None:
        """Gives the ticket back; ``otherwise``: how the request ended if it was not completed."""
        self._release_body()
        self._body.clear()
        if self._ticket is not None:
            ticket, self._ticket = self._ticket, None
            ticket.leave(End.COMPLETED if self._completed else otherwise)

    def _release_body(self) -> None:
        self._proxy.held_bytes -= self._held
        self._held = 0

    # Time-outs.
    def _arm(self, seconds: float, expired: Callable[[], None]) -> None:
        self._disarm()
        self._timer = self._loop.call_later(seconds, expired)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _idle_too_long(self) -> None:
        if self._transport.get_write_buffer_size():
            self.abort()
        else:
            self._transport.close()

    def _head_too_slow(self) -> None:
        self._refuse(answers.request_timeout("head", self._limits.header_seconds), body_read=False)

    def _body_too_slow(self) -> None:
        self._refuse(answers.request_timeout("body", self._limits.body_seconds), body_read=False)

    def _linger_on(self) -> None:
        """Lingering ends once the answer is out; one that a slow client is still reading has the stall time-out."""
        if self._transport.get_write_buffer_size():
            self._arm(self._limits.linger_seconds, self._linger_on)
        else:
            self._transport.abort()
