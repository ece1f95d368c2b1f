"""Answers that the proxy gives itself: errors in the shape that OpenAI clients parse."""

import http
import json

from kvplane_runtime.proxy.gate import Refusal
from kvplane_runtime.proxy.http1 import ProtocolError


def error_body(refusal: Refusal) -> bytes:
    """JSON body ``{"error": {"message", "type", "param", "code"}}``."""
    error = {"message": refusal.message, "type": _kind(refusal.status), "param": refusal.param, "code": refusal.code}
    return json.dumps({"error": error}).encode()


def _kind(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def error_response(refusal: Refusal, *, request_id: bytes, close: bool, head_only: bool) -> bytes:
    """The whole response; ``head_only`` for an answer to HEAD, which has the length of a body but not the body."""
    body = error_body(refusal)
    lines = [
        f"HTTP/1.1 {refusal.status} {http.HTTPStatus(refusal.status).phrase}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n".encode(),
        b"x-request-id: %b\r\n" % request_id,
    ]
    if refusal.retry_after_seconds is not None:
        lines.append(b"retry-after: %d\r\n" % refusal.retry_after_seconds)
    if refusal.reason is not None:
        lines.append(b"x-kvplane-reason: %b\r\n" % refusal.reason.encode())
    if close:
        lines.append(b"connection: close\r\n")
    lines.append(b"\r\n")
    if not head_only:
        lines.append(body)
    return b"".join(lines)


def from_protocol_error(error: ProtocolError) -> Refusal:
    """The refusal of a request that broke HTTP."""
    return Refusal(error.status, error.code, str(error))


def body_too_large(limit_bytes: int) -> Refusal:
    """413: the body is over the service's limit."""
    return Refusal(
        413,
        "body_too_large",
        f"The request body is larger than {limit_bytes} bytes (admission.maxBodyBytes); send a smaller one.",
    )


def request_timeout(what: str, seconds: float) -> Refusal:
    """408: the client was too slow in sending ``what``."""
    return Refusal(408, "request_timeout", f"The {what} of the request did not arrive within {seconds:g} seconds.")


def buffers_full() -> Refusal:
    """503: all request bodies together would exceed what this proxy may hold."""
    return Refusal(503, "proxy_overloaded", "Too many request bytes are being held here; retry soon.", 1)


def unreachable() -> Refusal:
    """503: nothing was sent, so trying again is always safe."""
    return Refusal(503, "engine_unavailable", "The engine does not accept connections; retry soon.", 1)


def bad_gateway(reason: str) -> Refusal:
    """502: the engine broke off or answered garbage."""
    return Refusal(502, "engine_error", f"The engine did not answer properly: {reason}.")


def gateway_timeout(seconds: float) -> Refusal:
    """504: the engine is silent."""
    return Refusal(504, "engine_timeout", f"The engine sent nothing for {seconds:g} seconds.")
