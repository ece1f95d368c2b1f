"""One load on one engine for some minutes, with the sidecar's accounting beside the truth.

The sidecar's part is the product's own: each step's KV events go into a :class:`KvEventLedger`, each second's counters
into a :class:`KvAccount`. A second account gets no events, as beside an engine that publishes none, and falls back on
its estimates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from bench.thrash.loads import Load
from bench.thrash.model import Counts, Engine
from kvplane_runtime.signals.account import Counters, KvAccount
from kvplane_runtime.signals.ledger import KvEventLedger

SCRAPE_SECONDS: Final = 1.0
TICK_SECONDS: Final = 10.0
TRUTH_TICKS: Final = 6
"""Truth is the wasted share of a minute ..."""
THRASHES: Final = 0.10
"""... from which on the engine does thrash; where it lasts for a minute, the detector must say so."""
HEALTHY: Final = 0.03
"""Below it in every minute, it must be silent. In between both answers are right."""


Change = tuple[float, Callable[[Engine], Engine]]
"""At which time what is done to the engine; it gives the engine that goes on."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Ten seconds."""

    ended: float
    wasted: int
    """Tokens computed again, or moved back from another tier."""
    handled: int
    """Tokens computed or moved."""
    alarm: str | None
    """Kind of thrashing the detector says there is."""


@dataclass(frozen=True, slots=True)
class Episode:
    """A time in which the engine thrashed, or in which the alarm was on."""

    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class Trial:
    """What happened."""

    ticks: tuple[Tick, ...]
    alarms: tuple[tuple[float, str], ...]
    """Each time the alarm began, and its first kind."""

    def wasted_share(self, first: int, last: int) -> float:
        """Truth over some ticks."""
        part = self.ticks[max(0, first) : last]
        handled = sum(tick.handled for tick in part)
        return sum(tick.wasted for tick in part) / handled if handled else 0.0

    def minutes(self) -> list[float]:
        """Truth over the minute that ends with each tick."""
        return [self.wasted_share(end - TRUTH_TICKS, end) for end in range(1, len(self.ticks) + 1)]

    def thrashing(self) -> list[Episode]:
        """The times of at least a minute in which the engine thrashed, each from its first wasteful tick on."""
        episodes, begun = [], None
        for number, share in enumerate([*self.minutes(), 0.0]):
            if share >= THRASHES and begun is None:
                begun = number
            elif share < THRASHES and begun is not None:
                if number - begun >= TRUTH_TICKS:
                    episodes.append(Episode(self._onset(begun), self.ticks[number - 1].ended))
                begun = None
        return episodes

    def _onset(self, number: int) -> float:
        wasteful = (
            n for n in range(max(0, number - TRUTH_TICKS + 1), number + 1) if self.wasted_share(n, n + 1) >= THRASHES
        )
        return self.ticks[next(wasteful, number)].ended - TICK_SECONDS

    @property
    def healthy(self) -> bool:
        """Whether the engine wasted next to nothing in every minute."""
        return max(self.minutes()) < HEALTHY


@dataclass(frozen=True, slots=True)
class Run:
    """One run, as it was seen with KV events and without."""

    sighted: Trial
    blind: Trial


class _Observer:
    """One account, and what it said."""

    def __init__(self, contexts: Callable[[], list[int]]) -> None:
        self.account = KvAccount(ledger=KvEventLedger())
        self.account.contexts = contexts
        self.alarms: list[tuple[float, str]] = []
        self.kinds: list[str | None] = []
        """At each tick."""

    def scrape(self, counters: Counters, now: float) -> None:
        before = self.account.thrash.kind
        self.account.observe(counters, now)
        kind = self.account.thrash.kind
        if kind is not None and before is None:
            self.alarms.append((now, kind))
        if now % TICK_SECONDS == 0:
            self.kinds.append(kind)

    def trial(self, work: Sequence[tuple[int, int]]) -> Trial:
        ticks = (
            Tick(ended=TICK_SECONDS * number, wasted=wasted, handled=handled, alarm=kind)
            for number, ((wasted, handled), kind) in enumerate(zip(work, self.kinds, strict=True), start=1)
        )
        return Trial(tuple(ticks), tuple(self.alarms))


def run(engine: Engine, load: Load, *, seconds: float, changes: Sequence[Change] = ()) -> Run:
    """Runs a load for some simulated time."""
    sighted = _Observer(lambda: [request.computed for request in engine.running])
    blind = _Observer(lambda: [request.computed for request in engine.running])
    work: list[tuple[int, int]] = []
    pending = list(changes)
    seen = replace(engine.counts)
    for second in range(1, round(seconds / SCRAPE_SECONDS) + 1):
        now = second * SCRAPE_SECONDS
        while engine.now < now:
            if pending and engine.now >= pending[0][0]:
                engine = pending.pop(0)[1](engine)
                seen = replace(engine.counts)
            for request in load.due(engine.now):
                engine.add(request)
            for request in engine.step():
                load.completed(request, engine.now)
            batch = engine.take_batch()
            if batch is not None:
                sighted.account.ledger.apply(batch, engine.now)
        sighted.account.ledger.heard(now)
        for observer in (sighted, blind):
            observer.scrape(_counters(engine), now)
        if now % TICK_SECONDS == 0:
            work.append(_work(seen, engine.counts))
            seen = replace(engine.counts)
    return Run(sighted.trial(work), blind.trial(work))


def _counters(engine: Engine) -> Counters:
    counts = engine.counts
    return Counters(
        usage=engine.usage,
        kv_blocks=engine.blocks,
        block_size_tokens=engine.block_size,
        running=len(engine.running),
        preemptions=counts.preemptions,
        prompt_tokens=counts.prompt_tokens,
        generation_tokens=counts.generation_tokens,
        prefix_queries_tokens=counts.prefix_queries_tokens,
        prefix_hits_tokens=counts.prefix_hits_tokens,
        reloaded_tokens=counts.reloaded_tokens,
    )


def _work(before: Counts, after: Counts) -> tuple[int, int]:
    """Tokens computed again or moved back, and all tokens computed or moved."""
    wasted = after.wasted_tokens - before.wasted_tokens + after.reloaded_again_tokens - before.reloaded_again_tokens
    handled = after.computed_tokens - before.computed_tokens + after.reloaded_tokens - before.reloaded_tokens
    return wasted, handled
