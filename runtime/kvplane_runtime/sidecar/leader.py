"""Rank 0's drain, as the sidecar of a worker sees it.

When a group goes, all of its pods are told to at once, and a worker that went first would take its KV from under the requests
that rank 0 is finishing. So a worker goes when rank 0 is done, or does not drain: then only this pod goes, and the ring works
on without it. Rank 0 is asked after the grace of the worker's own drain, in which it had time to begin its own.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

import aiohttp

from kvplane_api.names import PORT_ADMIN, rank_0_of, rank_of
from kvplane_api.wire import SidecarState
from kvplane_runtime.sidecar.engine import whole

log = logging.getLogger(__name__)

ASK_SECONDS: Final = 0.5
"""Between two questions."""
ANSWER_SECONDS: Final = 2.0
UNANSWERED: Final = 3
"""Who does not answer in this time, so often in a row, is gone or cut off: its requests are not to be saved from here. One answer
that comes late is a busy node, and all workers would leave for it."""


def address(pod: str) -> str | None:
    """Where rank 0's sidecar is asked, by the name of a worker's pod; None for rank 0, and for a pod of no set."""
    rank = rank_of(pod)
    return f"http://{rank_0_of(rank[0])}:{PORT_ADMIN}" if rank is not None and rank[1] > 0 else None


class LeaderDrain:
    """What rank 0's sidecar says of its drain."""

    def __init__(self, *, base_url: str, clock: Callable[[], float]) -> None:
        self._base_url = base_url
        self._clock = clock

    async def over(self, *, until: float) -> None:
        """Returns when rank 0 does not drain, or is done, or is gone; at ``until`` on the clock at the latest."""
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

    async def _drains(self, session: aiohttp.ClientSession) -> bool | None:
        """None: it did not answer in time."""
        try:
            async with session.get(f"{self._base_url}/state", allow_redirects=False) as response:
                state = SidecarState.model_validate_json(await whole(response))
        except TimeoutError:
            return None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            log.info("Rank 0 does not say whether it drains: %s", str(error) or type(error).__name__)
            return False
        return state.draining and not state.drained
