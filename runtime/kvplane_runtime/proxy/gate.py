"""The seam where a request is let in or refused.

Every request with a valid head enters one gate. The gate hands out a ticket or a refusal at once, before any byte of the
body is read, so that a refused upload costs nothing; the ticket decides again when the body is complete, and may take
its time over it: that is where admission by KV memory waits for room. Whatever happens to the request, its ticket is
left exactly once; what a ticket reserved is given back there.
"""

from dataclasses import dataclass
from typing import Protocol

from kvplane_runtime.proxy.http1 import Request, RequestHead


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not served: an OpenAI-style error with its HTTP status."""

    status: int
    code: str
    """Stable and machine-readable, such as ``engine_loading``."""
    message: str
    """Whole sentences for a human: what is wrong, and the way out."""
    retry_after_seconds: int | None = None


class Ticket(Protocol):
    """One request's stay behind the gate."""

    @property
    def last_on_connection(self) -> bool:
        """Whether the client is to be told ``Connection: close``; read when the response head is written."""

    async def admit(self, request: Request) -> Refusal | None:
        """Decides once the body is complete. Cancelled if the client goes away meanwhile."""

    def leave(self) -> None:
        """The request is over, served or not."""


class Gate(Protocol):
    """What stands between clients and upstream."""

    def enter(self, head: RequestHead) -> Ticket | Refusal:
        """Decides on the head alone."""
