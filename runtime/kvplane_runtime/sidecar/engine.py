"""What the sidecar knows of its engine: health, identity and signals, each polled every second.

Polling is separate for health and for metrics, so that a hanging ``/metrics`` never makes a serving engine unready: it
only ages the signals. Nothing here is guessed: before the first answer everything is unknown.

Whatever an engine answers, the sidecar goes on, since other requests' streams pass through it: what cannot be is as good as no
answer. An engine that redirects is not followed; where that leads to is not the engine.

A paged engine whose health check fails is dead. A rank of a ring that answers 503 waits for the others of its ring, and holds KV
meanwhile: it is started and alive, and ready as a member of a ring that works. With any other error it says that it hangs.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import aiohttp

from kvplane_runtime.sidecar import passed_on
from kvplane_runtime.sidecar.signals import MOST_COUNT, Scrape, normalise
from kvplane_runtime.signals.account import KvAccount
from kvplane_runtime.signals.ledger import KvEventLedger

log = logging.getLogger(__name__)
T = TypeVar("T")

POLL_SECONDS: Final = 1.0
METRICS_TIMEOUT_SECONDS: Final = 5.0
SILENCE_TOLERANCE_SECONDS: Final = 10.0
"""An engine whose ``/health`` hangs is still ready and alive this long: a long tokenization blocks its server briefly.
The kubelet's periods and thresholds come on top."""
HEALTH_TIMEOUT_SECONDS: Final = SILENCE_TOLERANCE_SECONDS
"""One question waits as long: on a starved node each answer may take seconds, and all of them would be missed."""
_WAITS: Final = 503
"""What a rank answers that is well, and in no ring that works."""
_MAX_EXPOSITION_BYTES: Final = 8 * 1024 * 1024
_MOST_VERSION_LENGTH: Final = 128
"""Of what becomes the label of a metric."""


class EngineHealth:
    """What the answers of ``/health`` mean for readiness and liveness. Pure; times are seconds of one clock."""

    def __init__(self, *, now: float) -> None:
        self._since = now
        self._last_well: float | None = None
        self._refused = False
        self._failing = True
        self._waits = False
        self._seen_starting = False
        """Whether this sidecar was there before the engine's first life."""
        self.startup_seconds: float | None = None
        """From the sidecar's start to the engine's first healthy answer; None where a restarted sidecar found it up."""

        self.starts = 0
        """How often the engine came up: well after nothing had listened on its port, or for the first time."""

    def answered(self, now: float) -> None:
        """``/health`` said 200."""
        self._well(now)
        self._waits = False
        if self._seen_starting and self.starts == 1 and self.startup_seconds is None:
            self.startup_seconds = now - self._since

    def waits(self, now: float) -> None:
        """``/health`` of a rank said that it is well, and in no ring that works."""
        self._well(now)
        self._waits = True

    def failed(self) -> None:
        """``/health`` said that the engine is dead (an error status)."""
        self._failing = True

    def refused(self) -> None:
        """Nothing listens on the engine's port."""
        self._refused = self._failing = True

    def ready(self, now: float) -> bool:
        """Whether requests may be sent: the last answer was good, and is not older than the tolerance."""
        return not (self.loading or self._failing or self._waits) and self.alive(now)

    def alive(self, now: float) -> bool:
        """Whether the engine need not be killed. A sidecar that has just started gives it the benefit of the doubt."""
        heard = self._since if self._last_well is None else self._last_well
        return now - heard <= SILENCE_TOLERANCE_SECONDS

    @property
    def loading(self) -> bool:
        """Whether the engine's present life has not been well yet."""
        return self._refused or self._last_well is None

    def dead(self, now: float) -> bool:
        """Whether waiting for the engine is pointless: it says so, nothing listens, or it is silent for too long."""
        return self._failing or not self.alive(now)

    def _well(self, now: float) -> None:
        if self.loading:
            self.starts += 1
        if self._last_well is None:
            self._seen_starting = self._refused
        self._last_well = now
        self._refused = self._failing = False


class EngineMonitor:
    """Polls one engine and keeps what it said last.

    ``ring``: the engine is a rank of a ring; ``worker``: another one than rank 0, which alone has ``/v1/models``.
    """

    def __init__(self, *, base_url: str, clock: Callable[[], float], ring: bool = False, worker: bool = False) -> None:
        self._base_url = base_url
        self._ring = ring
        self._worker = worker
        self._clock = clock
        self.health = EngineHealth(now=clock())
        self.scrape: Scrape | None = None
        """The last good scrape; None before the first."""
        self.seen: dict[str, float] = {}
        """When each signal was last present, on the clock."""
        self.scraped_at: float | None = None
        self.kv = KvAccount(ledger=KvEventLedger())
        """Evictions, waste and thrashing, from the scrapes and from whoever feeds the ledger."""
        self.passed_on: str | None = None
        """What the last scrape had of the metrics that are passed on; None where it failed, since they do not age."""
        self._unreadable = False
        """Whether the last exposition was malformed: said once, not every second."""
        self.version: str | None = None
        self.max_model_len_tokens: int | None = None

    @property
    def starts(self) -> int:
        """How often the engine was seen to come up."""
        return self.health.starts

    def ready(self) -> bool:
        """Whether requests may be sent to the engine now."""
        return self.health.ready(self._clock())

    def started(self) -> bool:
        """Whether the engine has got through its start: it serves or, as a rank of a ring, answers at all."""
        return not self.health.loading if self._ring else self.ready()

    def alive(self) -> bool:
        """Whether the engine need not be killed."""
        return self.health.alive(self._clock())

    def dead(self) -> bool:
        """Whether waiting for the engine is pointless."""
        return self.health.dead(self._clock())

    def take(self, scrape: Scrape) -> None:
        """Keeps a good scrape, dates the signals it has, and takes it into account."""
        self.scrape = scrape
        self.scraped_at = self._clock()
        self.seen.update(dict.fromkeys(scrape.present, self.scraped_at))
        self.kv.observe(scrape.counters(), self.scraped_at)

    async def run(self) -> None:
        """Polls until cancelled."""
        timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_SECONDS)
        async with aiohttp.ClientSession(self._base_url, timeout=timeout) as session, asyncio.TaskGroup() as polls:
            polls.create_task(_every(POLL_SECONDS, lambda: self._poll_health(session)))
            polls.create_task(_every(POLL_SECONDS, lambda: self._poll_metrics(session)))

    async def _poll_health(self, session: aiohttp.ClientSession) -> None:
        try:
            async with session.get("/health", allow_redirects=False) as response:
                status = response.status
        except aiohttp.ClientConnectorError:
            self.health.refused()
            return
        except (aiohttp.ClientError, TimeoutError):
            return  # silence: the tolerance decides
        before = self.starts
        if status == 200:
            self.health.answered(self._clock())
        elif self._ring and status == _WAITS:
            self.health.waits(self._clock())
        else:
            self.health.failed()
        if self.starts != before:
            log.info("The engine is up.")
            self.version = self.max_model_len_tokens = None
            if before:
                self.kv.restarted()
        if status != 200:
            return
        if self.version is None:
            self.version = _version(await _json(session, "/version"))
        if self.max_model_len_tokens is None and not self._worker:
            self.max_model_len_tokens = _max_model_len(await _json(session, "/v1/models"))

    async def _poll_metrics(self, session: aiohttp.ClientSession) -> None:
        passed: str | None = None
        try:
            timeout = aiohttp.ClientTimeout(total=METRICS_TIMEOUT_SECONDS)
            async with session.get("/metrics", timeout=timeout, allow_redirects=False) as response:
                if response.status != 200:
                    return
                text = (await whole(response)).decode("utf-8", errors="replace")
                passed = passed_on.lines(text) if self._ring else None
                scrape = normalise(text)
        except (aiohttp.ClientError, TimeoutError):
            return
        except ValueError as error:
            if not self._unreadable:
                log.warning("The engine's metrics cannot be read: %s", error)
            self._unreadable = True
            return
        finally:
            self.passed_on = passed
        self._unreadable = False
        self.take(scrape)


async def _every(seconds: float, poll: Callable[[], Awaitable[None]]) -> None:
    while True:
        await poll()
        await asyncio.sleep(seconds)


async def whole(response: aiohttp.ClientResponse) -> bytes:
    """The body; raises ValueError if it is larger than any answer that is asked for."""
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > _MAX_EXPOSITION_BYTES:
            raise ValueError(f"they are larger than {_MAX_EXPOSITION_BYTES} bytes.")
    return bytes(body)


async def _json(session: aiohttp.ClientSession, path: str) -> object:
    """The JSON at ``path``; None if there is none (other engines lack these endpoints)."""
    try:
        async with session.get(path, allow_redirects=False) as response:
            return json.loads(await whole(response)) if response.status == 200 else None
    except (aiohttp.ClientError, TimeoutError, ValueError, RecursionError):  # the last for nesting without end
        return None


def _version(answer: object) -> str | None:
    """What ``/version`` says; None unless it can be a label."""
    version = _field(answer, "version", str)
    return version if version and version.isprintable() and len(version) <= _MOST_VERSION_LENGTH else None


def _max_model_len(answer: object) -> int | None:
    """The context limit of the first model of ``/v1/models``; None where there is none that can be."""
    models = _field(answer, "data", list) or [None]
    length = _field(models[0], "max_model_len", int)
    return length if length is not None and 1 <= length <= MOST_COUNT else None


def _field(value: object, name: str, kind: type[T]) -> T | None:
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, kind) and not isinstance(found, bool) else None  # true is no number
