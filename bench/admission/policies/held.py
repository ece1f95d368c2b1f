"""Requests that a policy keeps: first in, first out, with one bound on the waiting time."""

from collections import deque

from bench.admission.policy import Request, Ruling, Verdict


class HeldRequests:
    """A queue whose head is never overtaken."""

    def __init__(self, *, limit_seconds: float) -> None:
        """``limit_seconds``: longest wait; a request that has waited so long is refused."""
        self._limit_seconds = limit_seconds
        self._queue: deque[Request] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, request: Request) -> None:
        self._queue.append(request)

    def head(self) -> Request | None:
        """The request that waits longest; None where nothing waits."""
        return self._queue[0] if self._queue else None

    def take(self) -> Ruling:
        """Lets the head pass."""
        return Ruling(self._queue.popleft().id, Verdict.PASS)

    def refuse_expired(self, now: float) -> list[Ruling]:
        """Refuses those that have waited too long."""
        expired = []
        while (until := self.expires_at()) is not None and until <= now:
            expired.append(Ruling(self._queue.popleft().id, Verdict.REFUSE))
        return expired

    def expires_at(self) -> float | None:
        """When the head has waited too long; None where nothing waits."""
        return self._queue[0].arrived + self._limit_seconds if self._queue else None
