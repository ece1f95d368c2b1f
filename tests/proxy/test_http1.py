"""Heads and chunked framing, without I/O."""

import gc
import itertools
import weakref

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane_runtime.proxy.http1 import (
    ChunkedScanner,
    Framing,
    HeadReader,
    ProtocolError,
    Request,
    RequestHead,
    ResponseHead,
    request_bytes,
    response_bytes,
)

GET = b"GET / HTTP/1.1\r\nHost: a\r\n"


def read_request(data: bytes, *, max_bytes: int = 1024, max_fields: int = 16) -> RequestHead:
    reader = HeadReader(response=False, max_bytes=max_bytes, max_fields=max_fields)
    assert reader.feed(data) == len(data)
    return reader.request()


def read_response(data: bytes, *, method: bytes = b"GET") -> ResponseHead:
    reader = HeadReader(response=True, max_bytes=1024, max_fields=16)
    assert reader.feed(data) is not None
    return reader.response(method=method)


def test_a_request_head_is_read() -> None:
    head = read_request(b"POST /v1/x?y=1 HTTP/1.1\r\nHost: a\r\nX-Empty:\r\nContent-Length: 12 \r\n\r\n")
    assert head == RequestHead(
        method=b"POST",
        target=b"/v1/x?y=1",
        version="1.1",
        headers=((b"Host", b"a"), (b"X-Empty", b""), (b"Content-Length", b"12")),
        content_length=12,
        chunked=False,
        keep_alive=True,
        expects_continue=False,
    )


def test_a_head_that_was_read_leaves_nothing_for_the_collector() -> None:
    reader = HeadReader(response=False, max_bytes=1024, max_fields=16)
    reader.feed(GET + b"\r\n")
    reader.request()
    gone = weakref.ref(reader)
    gc.disable()
    try:
        del reader
        assert gone() is None
    finally:
        gc.enable()


def test_a_head_ends_where_the_body_begins() -> None:
    reader = HeadReader(response=False, max_bytes=1024, max_fields=16)
    assert reader.feed(b"\r\n\r\nPOST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r") is None
    assert reader.feed(b"\n\r\nabc") == 3


@pytest.mark.parametrize(
    ("fields", "keep_alive"),
    [
        (b" HTTP/1.1\r\nHost: a\r\n\r\n", True),
        (b" HTTP/1.1\r\nHost: a\r\nConnection: x, Close\r\n\r\n", False),
        (b" HTTP/1.0\r\n\r\n", False),
        (b" HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", True),
    ],
)
def test_keep_alive_follows_version_and_connection(fields: bytes, keep_alive: bool) -> None:
    assert read_request(b"GET /" + fields).keep_alive is keep_alive


SMUGGLING = {
    "two lengths": b"Content-Length: 1\r\nContent-Length: 1\r\n",
    "two different lengths": b"Content-Length: 1\r\nContent-Length: 2\r\n",
    "length list": b"Content-Length: 1, 1\r\n",
    "signed length": b"Content-Length: +1\r\n",
    "overflowing length": b"Content-Length: 99999999999999999999999\r\n",
    "length and coding": b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n",
    "coding and length": b"Transfer-Encoding: chunked\r\nContent-Length: 1\r\n",
    "two codings": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
    "chunked not last": b"Transfer-Encoding: chunked, gzip\r\n",
    "almost chunked": b"Transfer-Encoding: xchunked\r\n",
    "folded line": b"X: a\r\n b\r\n",
    "folded first line": b" X: a\r\n",
    "space before colon": b"Content-Length : 1\r\n",
    "bare LF": b"X: a\nY: b\r\n",
    "bare CR": b"X: a\rY: b\r\n",
    "NUL": b"X: a\0b\r\n",
    "control character": b"X: a\x01b\r\n",
    "second Host": b"Host: b\r\n",
}


@pytest.mark.parametrize("fields", SMUGGLING.values(), ids=SMUGGLING.keys())
def test_what_two_readers_could_read_differently_is_refused(fields: bytes) -> None:
    with pytest.raises(ProtocolError) as refused:
        read_request(GET + fields + b"\r\n")
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400, "malformed_http"),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505, "http_version_not_supported"),
        (b"GET /\r\n\r\n", 505, "http_version_not_supported"),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 501, "connect_not_supported"),
        (GET + b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n", 501, "upgrade_not_supported"),
        (GET + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501, "transfer_encoding_not_supported"),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 501, "transfer_encoding_not_supported"),
        (GET + b"Expect: tea\r\n\r\n", 417, "expectation_failed"),
        (GET + b"X: " + b"x" * 1024 + b"\r\n\r\n", 431, "headers_too_large"),
        (GET + b"X: y\r\n" * 16 + b"\r\n", 431, "too_many_headers"),
        (bytes.fromhex("16030100a5010000a1"), 400, "malformed_http"),
        (b"GET / HTTP/1.1\n", 400, "malformed_http"),
    ],
)
def test_what_is_not_served_is_refused_by_name(data: bytes, status: int, code: str) -> None:
    with pytest.raises(ProtocolError) as refused:
        read_request(data)
    assert (refused.value.status, refused.value.code) == (status, code)


def test_an_offer_of_h2c_is_ignored() -> None:
    head = read_request(GET + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n\r\n")
    assert b"HTTP2-Settings" not in request_bytes(Request(head, b"id", b""))


def test_the_upstream_gets_end_to_end_fields_only() -> None:
    head = read_request(
        b"POST /x HTTP/1.1\r\nHost: a\r\nConnection: close, X-Hop, Host\r\nX-Hop: 1\r\nKeep-Alive: 1\r\nTE: trailers\r\n"
        b"Trailer: y\r\nProxy-Authorization: z\r\nExpect: 100-continue\r\nX-Request-Id: mine\r\n"
        b"traceparent: 00-ab-cd-01\r\nAuthorization: Bearer t\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    assert request_bytes(Request(head, b"id", b"abc")) == (
        b"POST /x HTTP/1.1\r\nHost: a\r\ntraceparent: 00-ab-cd-01\r\nAuthorization: Bearer t\r\n"
        b"x-request-id: id\r\ncontent-length: 3\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("data", "method", "framing", "length"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", b"GET", Framing.COUNTED, 5),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", b"HEAD", Framing.NONE, 0),
        (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n", b"GET", Framing.NONE, 0),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"GET", Framing.NONE, 0),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n", b"GET", Framing.CHUNKED, 0),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"GET", Framing.UNTIL_CLOSE, 0),
        (b"HTTP/1.0 200 OK\r\n\r\n", b"GET", Framing.UNTIL_CLOSE, 0),
    ],
)
def test_the_framing_of_a_response(data: bytes, method: bytes, framing: Framing, length: int) -> None:
    head = read_response(data, method=method)
    assert (head.framing, head.content_length) == (framing, length)


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        b"HTTP/1.1 999 What\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
    ],
)
def test_a_response_that_cannot_be_passed_on_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        read_response(data)


def test_the_client_gets_end_to_end_fields_only() -> None:
    head = read_response(
        b"HTTP/1.1 200 Fine\r\nConnection: close, X-Hop\r\nX-Hop: 1\r\nServer: u\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    assert response_bytes(head, request_id=b"id", chunked=True, connection=None) == (
        b"HTTP/1.1 200 Fine\r\nServer: u\r\nx-request-id: id\r\ntransfer-encoding: chunked\r\n\r\n"
    )


# Chunked framing.

CHUNKS = st.lists(st.binary(min_size=1, max_size=40), max_size=5)
TRAILERS = st.sampled_from([b"", b"X: y\r\n", b"X: y\r\nZ:\r\n"])


def chunked(chunks: list[bytes], trailers: bytes = b"") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n" + trailers + b"\r\n"


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    bounds = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(bounds)]


@given(chunks=CHUNKS, trailers=TRAILERS, rest=st.binary(max_size=20), cuts=st.lists(st.integers(0, 400), max_size=12))
def test_a_body_is_decoded_whatever_the_split(
    chunks: list[bytes], trailers: bytes, rest: bytes, cuts: list[int]
) -> None:
    content = bytearray()
    scanner = ChunkedScanner(content)
    left = b""
    for piece in pieces(chunked(chunks, trailers) + rest, cuts):
        left += piece if scanner.complete else piece[scanner.feed(piece) :]
    assert scanner.complete
    assert bytes(content) == b"".join(chunks)
    assert left == rest


class Oracle:
    """llhttp's verdict on a chunked body."""

    def __init__(self, data: bytes) -> None:
        self.content = b""
        self.complete = False
        self.broken = False
        parser = httptools.HttpRequestParser(self)
        parser.feed_data(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            # Byte by byte, as nothing else tells where the body ends.
            for index in range(len(data)):
                if self.complete:
                    break
                parser.feed_data(data[index : index + 1])
        except httptools.HttpParserError:
            self.broken = True

    def on_body(self, piece: bytes) -> None:
        self.content += piece

    def on_message_complete(self) -> None:
        self.complete = True


@given(
    data=st.one_of(
        st.text("0123aAfFgG;=x:\r\n \t\x00", max_size=40).map(str.encode),
        st.lists(
            st.sampled_from(
                [b"0\r\n", b"3\r\nabc\r\n", b"\r\n", b"a", b"5\r\nab", b"3;x=y\r\nabc\r\n", b"X: y\r\n", b"3\n"]
            ),
            max_size=6,
        ).map(b"".join),
    )
)
def test_the_scanner_never_takes_what_llhttp_refuses(data: bytes) -> None:
    oracle = Oracle(data)
    content = bytearray()
    scanner = ChunkedScanner(content)
    try:
        scanner.feed(data)
    except ProtocolError:
        return  # stricter is fine
    assert bytes(content) == oracle.content
    if scanner.complete or not oracle.broken:  # llhttp judges a line at its first bad byte, the scanner at its end
        assert scanner.complete == oracle.complete


@pytest.mark.parametrize(
    "data", [b"1" * 2000, b"1;" + b"x" * 2000, b"0\r\n" + b"X: y\r\n" * 2000, b"0\r\nX" + b"x" * 2000]
)
def test_endless_lines_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        ChunkedScanner().feed(data)
