"""The seam where requests are let in, refused, sent again and measured.

Every request with a valid head goes through one gate, in this order:

1. ``Gate.enter(head)`` gives a ticket or a refusal at once, before any byte of the body is read: a refused upload costs
   nothing.
2. ``Ticket.admit_now(request)`` when the body is complete gives the request to send, as it came or edited, or a refusal;
   or None, and ``await Ticket.admit(request)`` gives it later: there admission waits for room. That is cancelled when the
   client goes away. (A task for each request would cost it a turn of the event loop, which all streams share.)
3. ``Ticket.answered(head)`` when the engine's answer begins, before any of it is passed on: relay it (through a meter or
   not), drop it and go back to 2 with the request as it came (``Again``), or drop it and refuse. A ticket says ``Again``
   for a request that the engine has refused itself, and bounds how often; the proxy does not count.
4. ``Meter.feed`` for each piece of the body, ``Meter.finish`` at its end: framing removed before, put on again after.
5. ``Ticket.leave(end)`` exactly once, whatever happened and after whichever step: what a ticket holds is given back there.

All but ``admit`` are called from the event loop's callbacks, so they return at once and do not raise.
"""

import enum
from dataclasses import dataclass
from typing import Protocol

from kvplane_runtime.proxy.http1 import Request, RequestHead, ResponseHead


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not served: an OpenAI-style error with its HTTP status."""

    status: int
    code: str
    """Stable and machine-readable, such as ``engine_loading``."""
    message: str
    """Whole sentences for a human: what is wrong, and the way out."""
    retry_after_seconds: int | None = None
    param: str | None = None
    """The field of the request body that is at fault, such as ``stream_options.include_usage``."""
    reason: str | None = None
    """What was short, in one word for ``x-kvplane-reason``, such as ``kv``; None sends no such field."""


class End(enum.Enum):
    """How a request's stay ended."""

    COMPLETED = enum.auto()
    """The engine's answer was handed to the client's connection whole."""
    ABANDONED = enum.auto()
    """The client went away, or stopped reading, before it was."""
    UNSERVED = enum.auto()
    """Neither: it was refused, or the engine did not answer, or not to the end."""


class Meter(Protocol):
    """Reads a response body as it passes."""

    def feed(self, data: bytes) -> bytes:
        """The next bytes of the body; returns what the client gets now: all of it, less, or what was held back before.

        Where the length was announced (``Framing.COUNTED``) the lengths must be equal.
        """

    def finish(self) -> bytes:
        """The body is complete; returns what is still held back."""


@dataclass(frozen=True, slots=True)
class Relay:
    """The answer goes to the client; its body through ``meter`` where there is one."""

    meter: Meter | None = None


@dataclass(frozen=True, slots=True)
class Again:
    """The answer is dropped, the request is admitted anew."""


class Ticket(Protocol):
    """One request's stay behind the gate."""

    @property
    def last_on_connection(self) -> bool:
        """Whether the client is to be told ``Connection: close``; read when the response head is written."""

    def admit_now(self, request: Request) -> Request | Refusal | None:
        """Decides once the body is complete; the method of the request returned is that of the one given. None: not yet."""

    async def admit(self, request: Request) -> Request | Refusal:
        """The same, as long as it may take."""

    def answered(self, head: ResponseHead) -> Relay | Again | Refusal:
        """Decides what becomes of the engine's answer."""

    def leave(self, end: End) -> None:
        """The request is over."""


class Gate(Protocol):
    """What stands between clients and upstream."""

    def enter(self, head: RequestHead) -> Ticket | Refusal:
        """Decides on the head alone."""
