"""HTTP/1 heads and chunked framing: parsed strictly, written anew, without I/O.

llhttp in strict mode refuses what request smuggling lives on: duplicate or malformed Content-Length, Content-Length
beside Transfer-Encoding, obsolete line folding, bare LF, control characters. This module adds the checks that llhttp
leaves to its user (sizes, versions, one Host, chunked as the only coding) and never passes a head on as it came: hop-by-
hop fields are dropped, the rest is written again from the parsed parts.

Chunked bodies are scanned here rather than by llhttp, because httptools does not tell where a message ends, and that
offset is what separates a body from the bytes of the next message. A property test holds the scanner against llhttp.

Sources: RFC 9110 (semantics), RFC 9112 (framing; sections 6.3, 7.1, 9.3 and 11.2).
"""

import contextlib
import enum
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import httptools

Headers = tuple[tuple[bytes, bytes], ...]
"""Fields in order of arrival, names as spelled by the sender, values without surrounding whitespace."""

HOP_BY_HOP: Final = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
"""Fields that speak of one connection only (RFC 9110, 7.6.1); fields that Connection names are dropped with them."""

_NOT_FOR_UPSTREAM: Final = HOP_BY_HOP | {b"content-length", b"expect", b"x-request-id"}

_MAX_CHUNK_LINE: Final = 1024
_MAX_TRAILER_BYTES: Final = 8192
# The extension is bounded below _MAX_CHUNK_LINE, so that a line is judged alike whole and in pieces.
_CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[\t\x20-\x7e\x80-\xff]{0,1000})?\r\n")
_TRAILER_LINE: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*")


def _single_chunk_lines(longest: int) -> tuple[bytes, ...]:
    """For each length of one whole chunk, the size line that it begins with; b"" where no chunk has that length."""
    lines = [b""] * (longest + 1)
    for size in range(1, longest):
        line = b"%x\r\n" % size
        if (length := len(line) + size + 2) <= longest:
            lines[length] = line
    return tuple(lines)


_SINGLE_CHUNK: Final = _single_chunk_lines(4096)


class ProtocolError(Exception):
    """A peer broke HTTP; ``status`` is the answer a client gets for it, the message says what was wrong."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Framing(enum.Enum):
    """How the end of a response body is known (RFC 9112, 6.3)."""

    NONE = enum.auto()
    COUNTED = enum.auto()
    CHUNKED = enum.auto()
    UNTIL_CLOSE = enum.auto()


@dataclass(frozen=True, slots=True)
class RequestHead:
    """Request line and header fields of one request."""

    method: bytes
    target: bytes
    version: str
    """``1.1`` or ``1.0``."""
    headers: Headers
    content_length: int
    """Length of the body in bytes; 0 where there is none or where it is chunked."""
    chunked: bool
    keep_alive: bool
    expects_continue: bool

    def value(self, name: bytes) -> bytes | None:
        """First value of a field; ``name`` in lower case."""
        return _first(self.headers, name)


@dataclass(frozen=True, slots=True)
class Request:
    """One whole request: what admission sees and what is sent upstream."""

    head: RequestHead
    request_id: bytes
    body: bytes | bytearray
    """Not changed by anyone; a large one is handed on as it was gathered, since a copy of it would stop the event loop."""


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """Status line and header fields of one final (not 1xx) response."""

    status: int
    reason: bytes
    headers: Headers
    framing: Framing
    content_length: int
    """Bytes of the body when ``framing`` is COUNTED, else 0."""
    keep_alive: bool

    def value(self, name: bytes) -> bytes | None:
        """First value of a field; ``name`` in lower case."""
        return _first(self.headers, name)


class HeadReader:
    """Feeds llhttp the bytes of one head, and no byte more.

    Bytes go to llhttp as they come, so that garbage is refused at its first bytes, not when a time-out ends.
    """

    def __init__(self, *, response: bool, max_bytes: int, max_fields: int) -> None:
        self._kind = httptools.HttpResponseParser if response else httptools.HttpRequestParser
        self._parser: httptools.HttpResponseParser | httptools.HttpRequestParser | None = None
        """Only while the head is read: it refers back, and nothing of a request is to wait for a collection of cycles."""
        self._max_bytes = max_bytes
        self._max_fields = max_fields
        self._tail = b""
        self._size = 0
        self._finished = False
        self._fields: list[tuple[bytes, bytes]] = []
        self._target = b""
        self._reason = b""

    def feed(self, data: bytes) -> int | None:
        """Takes what belongs to the head; returns the offset behind it in ``data``, or ``None`` while it is incomplete.

        Raises ProtocolError: 400 for what llhttp refuses, 431 beyond a limit.
        """
        start = 0
        if not self._size:
            # Empty lines before a start line are skipped (RFC 9112, 2.2), else they would look like the end of a head.
            start = len(data) - len(data.lstrip(b"\r\n"))
        parser = self._parser
        if parser is None:
            parser = self._parser = self._kind(self)
        joined = self._tail + data[start:]
        found = joined.find(b"\r\n\r\n")
        end = len(data) if found < 0 else found + 4 - len(self._tail) + start
        self._size += end - start
        if self._size > self._max_bytes:
            raise ProtocolError(
                431,
                "headers_too_large",
                f"The head of the message is larger than {self._max_bytes} bytes; send fewer or shorter header fields.",
            )
        # The upgrade signal only says that the head is complete: its fields decide between refusing and ignoring it.
        try:
            with contextlib.suppress(httptools.HttpParserUpgrade):
                parser.feed_data(data[start:end])
        except httptools.HttpParserError as error:
            raise ProtocolError(400, "malformed_http", f"The message is not valid HTTP/1.1: {error}.") from error
        if len(self._fields) > self._max_fields:
            raise ProtocolError(
                431, "too_many_headers", f"The message has more than {self._max_fields} header fields; send fewer."
            )
        if self._finished != (found >= 0):
            raise ProtocolError(400, "malformed_http", "The message is not valid HTTP/1.1: its head ends ambiguously.")
        if found < 0:
            self._tail = joined[-3:]
            return None
        return end

    # Called by llhttp.
    def on_url(self, piece: bytes) -> None:
        self._target += piece

    def on_status(self, piece: bytes) -> None:
        self._reason += piece

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields.append((name, value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        self._finished = True

    def request(self) -> RequestHead:
        """The complete head of a request; raises ProtocolError for what this proxy does not serve."""
        parser, self._parser = self._parser, None
        assert isinstance(parser, httptools.HttpRequestParser)  # noqa: S101  (the constructor chose it)
        version = parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise ProtocolError(505, "http_version_not_supported", f"HTTP/{version} is not served here; use HTTP/1.1.")
        method = parser.get_method()
        if method == b"CONNECT":
            raise ProtocolError(
                501, "connect_not_supported", "CONNECT is not served here: this is not a forward proxy."
            )
        fields = _by_name(self._fields)
        hosts = fields.get(b"host", [])
        if len(hosts) > 1 or (version == "1.1" and not hosts):
            raise ProtocolError(400, "malformed_http", f"A request needs exactly one Host field, got {len(hosts)}.")
        upgrades = _tokens(fields.get(b"upgrade", ()))
        if upgrades - {b"h2c"}:
            # h2c alone is offered by some clients with every plain request; RFC 9110 (7.8) lets a server ignore it.
            offered = b", ".join(sorted(upgrades)).decode("latin-1")
            raise ProtocolError(501, "upgrade_not_supported", f"Upgrade to {offered} is not served here; use HTTP/1.1.")
        codings = fields.get(b"transfer-encoding", [])
        chunked = bool(codings)
        if chunked and (version == "1.0" or len(codings) > 1 or codings[0].lower() != b"chunked"):
            raise ProtocolError(
                501,
                "transfer_encoding_not_supported",
                "Of the transfer codings only chunked in HTTP/1.1 is served here.",
            )
        expectations = _tokens(fields.get(b"expect", ()))
        if expectations - {b"100-continue"}:
            raise ProtocolError(417, "expectation_failed", "Of the expectations only 100-continue is met here.")
        connection = _tokens(fields.get(b"connection", ()))
        return RequestHead(
            method=method,
            target=self._target,
            version=version,
            headers=tuple(self._fields),
            content_length=int(fields.get(b"content-length", (b"0",))[0]),
            chunked=chunked,
            keep_alive=b"close" not in connection and (version == "1.1" or b"keep-alive" in connection),
            expects_continue=bool(expectations) and version == "1.1",
        )

    def response(self, *, method: bytes) -> ResponseHead:
        """The complete head of a response to ``method``; raises ProtocolError for what must not be passed on."""
        parser, self._parser = self._parser, None
        assert isinstance(parser, httptools.HttpResponseParser)  # noqa: S101  (the constructor chose it)
        version = parser.get_http_version()
        status = parser.get_status_code()
        if version not in ("1.0", "1.1") or not 100 <= status <= 599 or status == 101:
            raise ProtocolError(
                400, "malformed_http", f"The answer HTTP/{version} {status} is not one that was asked for."
            )
        fields = _by_name(self._fields)
        codings = fields.get(b"transfer-encoding", [])
        lengths = fields.get(b"content-length", [])
        length = 0
        if status < 200 or status in (204, 304) or method == b"HEAD":
            framing = Framing.NONE
        elif codings:
            if lengths or version == "1.0" or len(codings) > 1 or codings[0].lower() != b"chunked":
                raise ProtocolError(400, "malformed_http", "The answer's Transfer-Encoding is not plain chunked.")
            framing = Framing.CHUNKED
        elif lengths:
            framing = Framing.COUNTED
            length = int(lengths[0])
        else:
            framing = Framing.UNTIL_CLOSE
        connection = _tokens(fields.get(b"connection", ()))
        return ResponseHead(
            status=status,
            reason=self._reason,
            headers=tuple(self._fields),
            framing=framing,
            content_length=length,
            keep_alive=framing is not Framing.UNTIL_CLOSE
            and b"close" not in connection
            and (version == "1.1" or b"keep-alive" in connection),
        )


class ChunkedScanner:
    """Follows chunked framing through any split of the bytes; strict, bounded, and exact about where the body ends.

    With ``content`` given, the payload is appended to it (that is how a body is decoded); without, nothing is copied.
    """

    def __init__(self, content: bytearray | None = None) -> None:
        self._content = content
        self._left = 0
        """Bytes of the current chunk still to come, its closing CRLF included."""
        self._line = b""
        """The part of a size or trailer line that has come so far."""
        self._trailer_bytes = -1
        """-1 before the last chunk, then the size of the trailer section."""
        self.complete = False

    def feed(self, data: bytes, start: int = 0) -> int:
        """Scans ``data`` from ``start``; returns the offset behind the last byte that belongs to the body.

        That is ``len(data)`` unless the body became complete. Raises ProtocolError (400) for broken framing.
        """
        position, size = start, len(data)
        while position < size and not self.complete:
            if not self._left and not self._line and (end := self._whole_chunk(data, position)):
                position = end
                continue
            if self._left:
                position = self._take_chunk(data, position)
                continue
            newline = data.find(b"\n", position)
            if newline < 0:
                self._line += data[position:]
                position = size
                self._bound_line()
                break
            line = self._line + data[position : newline + 1] if self._line else data[position : newline + 1]
            self._line = line
            self._bound_line()
            self._line = b""
            position = newline + 1
            if self._trailer_bytes < 0:
                self._start_chunk(line)
            else:
                self._take_trailer(line)
        return position

    def single_chunk(self, data: bytes) -> bytes:
        """The payload of ``data`` where that is one small chunk, as senders write it; else b"", and ``feed`` is to read it.

        This is how a streamed token comes; taking it changes nothing of the scanner's state.
        """
        if self._left or self._line or self._trailer_bytes >= 0 or len(data) >= len(_SINGLE_CHUNK):
            return b""
        line = _SINGLE_CHUNK[len(data)]
        if line and data[: len(line)] == line and data[-2:] == b"\r\n":
            return data[len(line) : -2]
        return b""

    def _whole_chunk(self, data: bytes, position: int) -> int:
        """Takes a chunk that lies in ``data`` whole, as a streamed token does; returns its end, 0 if there is none."""
        if self._trailer_bytes >= 0 or (line := _CHUNK_LINE.match(data, position)) is None:
            return 0
        begin = line.end()
        end = begin + int(line[1], 16) + 2
        if end == begin + 2 or not data.startswith(b"\r\n", end - 2):
            return 0
        if self._content is not None:
            self._content += data[begin : end - 2]
        return end

    def _take_chunk(self, data: bytes, position: int) -> int:
        end = min(len(data), position + self._left)
        content_end = min(end, position + self._left - 2)
        if self._content is not None and content_end > position:
            self._content += data[position:content_end]
        ending = data[max(position, content_end) : end]
        left = self._left - (end - position)
        if ending and ending != b"\r\n"[2 - left - len(ending) : 2 - left]:
            raise ProtocolError(400, "malformed_http", "A chunk of the body is not followed by CRLF.")
        self._left = left
        return end

    def _start_chunk(self, line: bytes) -> None:
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise ProtocolError(400, "malformed_http", "The size line of a chunk of the body is malformed.")
        length = int(match[1], 16)
        if length:
            self._left = length + 2
        else:
            self._trailer_bytes = 0

    def _take_trailer(self, line: bytes) -> None:
        if line == b"\r\n":
            self.complete = True
            return
        self._trailer_bytes += len(line)
        if not line.endswith(b"\r\n") or not _TRAILER_LINE.fullmatch(line[:-2]):
            raise ProtocolError(400, "malformed_http", "The trailer of the body is malformed.")
        if self._trailer_bytes > _MAX_TRAILER_BYTES:
            raise ProtocolError(431, "headers_too_large", f"The trailer is larger than {_MAX_TRAILER_BYTES} bytes.")

    def _bound_line(self) -> None:
        if len(self._line) > _MAX_CHUNK_LINE:
            raise ProtocolError(400, "malformed_http", f"A line of the chunked body is over {_MAX_CHUNK_LINE} bytes.")


def request_bytes(request: Request) -> bytes:
    """The head to send upstream for ``request``: end-to-end fields kept, body framed by Content-Length."""
    head = request.head
    lines = [b"%b %b HTTP/1.1\r\n" % (head.method, head.target)]
    lines += _end_to_end(head.headers, drop=_NOT_FOR_UPSTREAM, keep=(b"host",))
    lines.append(b"x-request-id: %b\r\n" % request.request_id)
    if request.body or head.method in (b"POST", b"PUT", b"PATCH"):
        lines.append(b"content-length: %d\r\n" % len(request.body))
    lines.append(b"\r\n")
    return b"".join(lines)


def response_bytes(head: ResponseHead, *, request_id: bytes, chunked: bool, connection: bytes | None) -> bytes:
    """The head to send to a client for an upstream response.

    ``chunked`` says whether the body follows in chunks; ``connection`` is the value of that field, None for no field.
    """
    lines = [b"HTTP/1.1 %d %b\r\n" % (head.status, head.reason)]
    lines += _end_to_end(head.headers, drop=HOP_BY_HOP if head.status != 204 else HOP_BY_HOP | {b"content-length"})
    if not any(name.lower() == b"x-request-id" for name, _ in head.headers):
        lines.append(b"x-request-id: %b\r\n" % request_id)
    if chunked:
        lines.append(b"transfer-encoding: chunked\r\n")
    if connection is not None:
        lines.append(b"connection: %b\r\n" % connection)
    lines.append(b"\r\n")
    return b"".join(lines)


def _end_to_end(headers: Headers, *, drop: frozenset[bytes], keep: Iterable[bytes] = ()) -> list[bytes]:
    """Header lines without those of ``drop``, and without fields that Connection names (but ``keep``)."""
    if named := _tokens([value for name, value in headers if name.lower() == b"connection"]):
        drop |= named.difference(keep)
    return [b"%b: %b\r\n" % (name, value) for name, value in headers if name.lower() not in drop]


def _first(headers: Headers, name: bytes) -> bytes | None:
    return next((value for field, value in headers if field.lower() == name), None)


def _by_name(fields: Iterable[tuple[bytes, bytes]]) -> dict[bytes, list[bytes]]:
    found: dict[bytes, list[bytes]] = {}
    for name, value in fields:
        found.setdefault(name.lower(), []).append(value)
    return found


def _tokens(values: Sequence[bytes]) -> set[bytes]:
    """Members of a comma-separated list field, in lower case."""
    if not values:
        return set()
    return {token.strip(b" \t").lower() for value in values for token in value.split(b",")} - {b""}
