"""Peers that can misbehave: an upstream driven by a script, and a client that is a bare socket."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from kvplane_runtime.proxy.gate import Again, End, Meter, Refusal, Relay
from kvplane_runtime.proxy.http1 import Request, RequestHead, ResponseHead
from kvplane_runtime.proxy.limits import Limits
from kvplane_runtime.proxy.server import Proxy
from kvplane_runtime.proxy.upstream import UpstreamPool

HELLO = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"


async def until(condition: Callable[[], bool]) -> None:
    """Waits for something that another task, or the kernel, brings about."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  (what is waited for has no event)
            await asyncio.sleep(0.002)


def serving() -> list[str]:
    """The tasks of requests that the proxy still works on."""
    names = [task.get_coro().__qualname__ for task in asyncio.all_tasks() if not task.done()]  # type: ignore[union-attr]
    return [name for name in names if name.startswith("ClientConnection.")]


@dataclass
class UpstreamSocket:
    """The upstream's end of one connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    requests: list[tuple[bytes, bytes]] = field(default_factory=list)
    """Heads and bodies that came on it."""

    async def request(self) -> tuple[bytes, bytes]:
        """The next request, whose body the proxy always counts; raises IncompleteReadError when the proxy hung up."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = header(head, b"content-length")
        body = await self.reader.readexactly(int(length)) if length else b""
        self.requests.append((head, body))
        return head, body

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def hung_up(self) -> None:
        """Returns when the proxy closed or reset the connection."""
        try:
            while await self.reader.read(65536):
                pass
        except ConnectionResetError:
            pass


Script = Callable[[UpstreamSocket], Awaitable[None]]


async def answer_hello(socket: UpstreamSocket) -> None:
    """An upstream as it should be: answers every request, keeps the connection."""
    while True:
        await socket.request()
        await socket.send(HELLO)


class FakeUpstream:
    """Runs a script per connection; keeps what came."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.sockets: list[UpstreamSocket] = []
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server

    @property
    def requests(self) -> list[tuple[bytes, bytes]]:
        return [request for socket in self.sockets for request in socket.requests]

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", port, limit=1 << 20)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for socket in self.sockets:
            socket.writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        socket = UpstreamSocket(reader, writer)
        self.sockets.append(socket)
        task = asyncio.create_task(self._run(socket))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, socket: UpstreamSocket) -> None:
        try:
            await self.script(socket)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            socket.writer.close()


@dataclass
class Response:
    """What a client read: head and body as they came, the body decoded if it was chunked."""

    status: int
    head: bytes
    body: bytes

    def header(self, name: bytes) -> bytes | None:
        return header(self.head, name)


class Client:
    """A bare connection to the proxy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> bytes:
        return await self.reader.readuntil(b"\r\n\r\n")

    async def response(self, *, method: bytes = b"GET") -> Response:
        """The next response, read as its framing says."""
        head = await self.head()
        status = int(head.split(b" ", 2)[1])
        length = header(head, b"content-length")
        if method == b"HEAD" or status in (100, 204, 304):
            body = b""
        elif header(head, b"transfer-encoding") == b"chunked":
            body = b""
            while piece := await self.chunk():
                body += piece
        elif length is not None:
            body = await self.reader.readexactly(int(length))
        else:
            body = await self.reader.read()
        return Response(status, head, body)

    async def chunk(self) -> bytes:
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def ask(self, data: bytes) -> Response:
        await self.send(data)
        return await self.response(method=data.split(b" ", 1)[0])

    async def closed(self) -> bytes:
        """Waits for the proxy to close; returns what still came."""
        try:
            return await self.reader.read()
        except ConnectionResetError:
            return b""

    def abort(self) -> None:
        self.writer.transport.abort()


def header(head: bytes, name: bytes) -> bytes | None:
    """Value of a field in a raw head; asserts that it is there at most once."""
    values = [
        line.split(b":", 1)[1].strip() for line in head.split(b"\r\n")[1:] if line.lower().startswith(name + b":")
    ]
    assert len(values) <= 1, head
    return values[0] if values else None


@dataclass
class OpenGate:
    """Lets everything in, unless told otherwise; counts like a real one."""

    refusal: Refusal | None = None
    refusal_after_body: Refusal | None = None
    last_on_connection: bool = False
    hold: asyncio.Event | None = None
    """If set, requests wait for it once their body is there."""
    edit: Callable[[Request], Request] = lambda request: request
    verdicts: list[Again | Refusal] = field(default_factory=list)
    """What becomes of the next answers; then they are relayed."""
    meter: Callable[[ResponseHead], Meter | None] = lambda head: None
    inside: int = 0
    entered: int = 0
    admitted: list[Request] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)
    """Status of each answer."""
    ends: list[End] = field(default_factory=list)
    """Of each request."""

    @property
    def completed(self) -> list[bool]:
        """Whether each request was."""
        return [end is End.COMPLETED for end in self.ends]

    def enter(self, head: RequestHead) -> "Pass | Refusal":
        del head
        if self.refusal:
            return self.refusal
        self.inside += 1
        self.entered += 1
        return Pass(self)


@dataclass
class Pass:
    gate: OpenGate
    left: bool = False

    @property
    def last_on_connection(self) -> bool:
        return self.gate.last_on_connection

    def admit_now(self, request: Request) -> Request | Refusal | None:
        if self.gate.hold:
            return None
        self.gate.admitted.append(request)
        return self.gate.refusal_after_body or self.gate.edit(request)

    async def admit(self, request: Request) -> Request | Refusal:
        self.gate.admitted.append(request)
        if self.gate.hold:
            await self.gate.hold.wait()
        return self.gate.refusal_after_body or self.gate.edit(request)

    def answered(self, head: ResponseHead) -> Relay | Again | Refusal:
        self.gate.answered.append(head.status)
        return self.gate.verdicts.pop(0) if self.gate.verdicts else Relay(self.gate.meter(head))

    def leave(self, end: End) -> None:
        assert not self.left, "a ticket was left twice"
        self.left = True
        self.gate.inside -= 1
        self.gate.ends.append(end)


@dataclass
class Stage:
    """A proxy between its peers."""

    proxy: Proxy
    gate: OpenGate
    upstream: FakeUpstream
    port: int
    clients: list[Client] = field(default_factory=list)

    async def client(self) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20))
        self.clients.append(client)
        return client

    async def ask(self, data: bytes) -> Response:
        return await (await self.client()).ask(data)

    async def settled(self) -> None:
        """Waits until nothing is in flight, and asserts that nothing leaked."""
        await until(lambda: not self.gate.inside and not serving())
        assert self.proxy.held_bytes == 0


@asynccontextmanager
async def staged(
    script: Script = answer_hello, *, limits: Limits | None = None, max_body_bytes: int = 1 << 20
) -> AsyncIterator[Stage]:
    """A proxy with a scripted upstream; everything is closed, and checked for leaks, at the end."""
    limits = limits or Limits()
    upstream = FakeUpstream(script)
    await upstream.start()
    gate = OpenGate()
    pool = UpstreamPool(host="127.0.0.1", port=upstream.port, limits=limits)
    proxy = Proxy(gate=gate, upstream=pool, limits=limits, max_body_bytes=lambda: max_body_bytes)
    (socket,) = await proxy.listen(host="127.0.0.1", port=0)
    stage = Stage(proxy, gate, upstream, socket.getsockname()[1])
    try:
        yield stage
    finally:
        for client in stage.clients:
            client.abort()
        proxy.stop_accepting()
        try:
            await stage.settled()
        finally:
            proxy.abort()
            await upstream.stop()
        await until(lambda: not proxy.connections)
