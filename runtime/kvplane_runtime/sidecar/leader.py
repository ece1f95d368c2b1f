"""Rank 0's drain, as the sidecar of a worker sees it.

When a group goes, all of its pods are told to at once, and a worker that went first would take its KV from under the requests
that rank 0 is finishing. So a worker goes when rank 0 is done, or does not drain: then only this pod goes, and the ring works
on without it. Rank 0 is asked after the grace of the worker's own drain, in which it had time to begin its own.

It is asked at the address that its name gave last: who deletes the service, or its namespace, deletes the names with it,
before the pods are gone.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Final

import aiohttp

from kvplane_api.names import rank_0_of, rank_of
from kvplane_api.wire import SidecarState
from kvplane_runtime.sidecar.engine import whole

log = logging.getLogger(__name__)

ASK_SECONDS: Final = 0.5
"""Between two questions."""
ANSWER_SECONDS: Final = 2.0
UNANSWERED: Final = 3
"""Who does not answer in this time, so often in a row, is gone or cut off: its requests are not to be saved from here. One answer
that comes late is a busy node, and all workers would leave for it."""
LOOK_UP_SECONDS: Final = 10.0
"""Between two looks at rank 0's name; a rank 0 that was made anew takes longer to load."""


def rank_0(pod: str) -> str | None:
    """The name of rank 0, by that of a worker's pod; None for rank 0, and for a pod of no set."""
    rank = rank_of(pod)
    return rank_0_of(rank[0]) if rank is not None and rank[1] > 0 else None


async def ip_of(host: str) -> str:
    """The address that a name gives; raises OSError where it gives none."""
    found = await asyncio.get_running_loop().getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    return str(found[0][4][0])


class LeaderDrain:
    """What rank 0's sidecar says of its drain."""

    def __init__(
        self, *, host: str, port: int, clock: Callable[[], float], look_up: Callable[[str], Awaitable[str]]
    ) -> None:
        """``host``: the name of rank 0, whose first part is its pod's; ``look_up`` is ``ip_of``."""
        self._host = host
        self._port = port
        self._clock = clock
        self._look_up = look_up
        self._ip: str | None = None
        """What the name gave last."""

    async def run(self) -> None:
        """Keeps rank 0's address in mind, until cancelled."""
        while True:
            await self._find()
            await asyncio.sleep(LOOK_UP_SECONDS)

    async def over(self, *, until: float) -> None:
        """Returns when rank 0 does not drain, or is done, or is gone; at ``until`` on the clock at the latest."""
        await self._find()  # it may be another pod since the last look
        waited, unanswered = False, 0
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS)) as session:
            while self._clock() < until and unanswered < UNANSWERED:
                drains = await self._drains(session)
                if drains is None:
                    unanswered += 1
                    continue
                if not drains:
                    return
                if not waited:
                    log.info("Rank 0 drains; this rank goes after it.")
                waited, unanswered = True, 0
                await asyncio.sleep(ASK_SECONDS)

    async def _find(self) -> None:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                self._ip = await self._look_up(self._host)
        except OSError:  # TimeoutError is one
            return

    async def _drains(self, session: aiohttp.ClientSession) -> bool | None:
        """None: it did not answer in time."""
        if self._ip is None:
            log.info("Rank 0 does not say whether it drains: the name %s was never known.", self._host)
            return False
        host = f"[{self._ip}]" if ":" in self._ip else self._ip
        try:
            async with session.get(f"http://{host}:{self._port}/state", allow_redirects=False) as response:
                state = SidecarState.model_validate_json(await whole(response))
        except TimeoutError:
            return None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            log.info("Rank 0 does not say whether it drains: %s", str(error) or type(error).__name__)
            return False
        # Its address may be another pod's by now.
        return state.pod == self._host.partition(".")[0] and state.draining and not state.drained
