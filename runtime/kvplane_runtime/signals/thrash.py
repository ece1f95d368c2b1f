"""Whether an engine thrashes: spends its time on tokens that it had computed before and threw away.

Throughput looks fine then, and usage is high under every good load, so neither can tell. What can, over windows of 10 s:

=====  =========================================================================================
``P``  wasted share: tokens computed again / tokens computed
``R``  restored share: blocks stored again shortly after their eviction / blocks stored (KV events)
``E``  evictions per second, against those of the last windows without waste
``h``  prefix hit rate over 60 s, against its own best of 10 minutes
``U``  share of the KV blocks that running requests hold
=====  =========================================================================================

A window votes for thrash if there is waste (R > 0.10 or P > 0.02) and it is either plain (P > 0.05) or shows in the
cache too (E and h both off their best). Plain waste needs no rise of E: an engine whose cache churns already, at the
rate it can compute, evicts no more when it starts to thrash (bench/thrash, "longer answers"). Three votes of five raise
the alarm; sixty seconds in which not even half of each threshold is passed end it. Its kind is that of most votes of the
last minutes: one episode has preemptions in one window and what they left behind in the next.

A cold start evicts nothing, traffic without repeats evicts without restoring, and a restarted or cleared engine starts
from nothing: none of them has waste, so none can vote.

What is unknown never votes. Without KV events R is unknown and P knows only preemptions, so ``prefix`` and ``offload``
cannot be told; bench/thrash measures what that costs.
"""

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Final, Literal, get_args

from kvplane_api.wire import ThrashState

WINDOW_SECONDS: Final = 10.0
VOTING_WINDOWS: Final = 5
VOTES: Final = 3
CLEARING_WINDOWS: Final = 6
KIND_VOTES: Final = 12
"""That the kind is taken from: two minutes of an episode without a break."""
HIT_RATE_WINDOWS: Final = 6
BEST_WINDOWS: Final = 60

RESTORED_SHARE: Final = 0.10
WASTED_SHARE: Final = 0.02
PLAIN_WASTED_SHARE: Final = 0.05
HIT_RATE_DROP: Final = 0.15
EVICTION_Z: Final = 2.0
FULL_USAGE: Final = 0.95
PRESSED_USAGE: Final = 0.90
PREEMPTED_SHARE: Final = 0.5
_BASELINE_WEIGHT: Final = 1 / 12
"""Of a window in the mean and variance of evictions: a memory of about two minutes."""
_BASELINE_SPREAD: Final = 0.1
"""Smallest standard deviation of evictions, as a share of their mean ..."""
_CACHE_SPREAD_PER_SECOND: Final = 1e-4
"""... and of the cache per second: below twice that, a turnover takes more than an hour."""
_LEAST_QUERIED_TOKENS: Final = 1000
"""A hit rate of fewer tokens says nothing."""

Kind = Literal["preemption", "prefix", "offload"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Gauges and counters of one moment. None: unknown. A counter that goes back says that the engine started anew."""

    usage: float | None = None
    """U, 0 to 1."""
    kv_blocks: int | None = None
    preemptions_total: float | None = None
    evictions_total: float | None = None
    stored_blocks_total: float | None = None
    restored_blocks_total: float | None = None
    restored_tokens_total: float | None = None
    reloaded_tokens_total: float | None = None
    """Tokens whose KV came from another tier instead of being computed."""
    wasted_tokens_total: float | None = None
    """Tokens computed again."""
    preempted_tokens_total: float | None = None
    """Context that preempted requests lost."""
    prompt_tokens_total: float | None = None
    """Once per prompt, whether they were computed or found in the cache."""
    generation_tokens_total: float | None = None
    prefix_queries_tokens_total: float | None = None
    prefix_hits_tokens_total: float | None = None


_COUNTERS: Final = tuple(field.name for field in fields(Sample) if field.name.endswith("_total"))


@dataclass(frozen=True, slots=True)
class _Window:
    """What changed in one window."""

    seconds: float
    usage: float | None
    kv_blocks: int
    change: dict[str, float]
    """By counter; an unknown one is absent."""

    def of(self, name: str) -> float:
        """Change of one counter; 0 where it is unknown."""
        return self.change.get(name, 0.0)

    @property
    def wasted_share(self) -> float:
        """P; 0 where it is unknown or nothing was computed."""
        prompts = max(0.0, self.of("prompt_tokens_total") - self.of("prefix_hits_tokens_total"))
        wasted = self.of("wasted_tokens_total")
        return _share(wasted, wasted + prompts + self.of("generation_tokens_total"))

    @property
    def restored_share(self) -> float:
        """R; 0 where it is unknown or nothing was stored."""
        return _share(self.of("restored_blocks_total"), self.of("stored_blocks_total"))

    @property
    def evictions_per_second(self) -> float:
        """E."""
        return self.of("evictions_total") / self.seconds

    def kind(self) -> Kind:
        """What is thrown away, and so what helps: fewer requests at once, fewer sessions, less offloading."""
        full = self.usage is not None and self.usage > FULL_USAGE
        pressed = self.usage is None or self.usage > PRESSED_USAGE
        lost = _share(self.of("preempted_tokens_total"), self.of("wasted_tokens_total"))
        if full or (self.of("preemptions_total") > 0 and (pressed or lost > PREEMPTED_SHARE)):
            return "preemption"
        return (
            "offload" if _share(self.of("reloaded_tokens_total"), self.of("restored_tokens_total")) > 0.5 else "prefix"
        )


class _Evictions:
    """Mean and spread of E over windows without waste."""

    def __init__(self) -> None:
        self._mean = 0.0
        self._variance = 0.0

    def z(self, window: _Window) -> float:
        """How far above, in standard deviations."""
        spread = max(
            math.sqrt(self._variance), _BASELINE_SPREAD * self._mean, _CACHE_SPREAD_PER_SECOND * window.kv_blocks, 1e-9
        )
        return (window.evictions_per_second - self._mean) / spread

    def learn(self, window: _Window) -> None:
        """Exponentially weighted (West 1979)."""
        off = window.evictions_per_second - self._mean
        self._mean += _BASELINE_WEIGHT * off
        self._variance = (1 - _BASELINE_WEIGHT) * (self._variance + _BASELINE_WEIGHT * off * off)


class ThrashDetector:
    """Feed it a sample about once a second."""

    def __init__(self) -> None:
        self.state = ThrashState()
        self._judge = _Judge()
        self._start: tuple[float, Sample] | None = None
        """Of the window that is open."""
        self._usages: list[float] = []
        """In it."""

    def observe(self, sample: Sample, now: float) -> ThrashState:
        """The state after this sample; ``now`` in seconds of any clock that does not go back."""
        if self._start is None or min(_change(self._start[1], sample).values(), default=0.0) < 0:
            self._judge = _Judge()
            self._open(sample, now)
            self.state = ThrashState()
            return self.state
        if sample.usage is not None:
            self._usages.append(sample.usage)
        started, first = self._start
        if now - started >= WINDOW_SECONDS:
            usage = sum(self._usages) / len(self._usages) if self._usages else None
            self.state = self._judge.close(_Window(now - started, usage, sample.kv_blocks or 0, _change(first, sample)))
            self._open(sample, now)
        return self.state

    def _open(self, sample: Sample, now: float) -> None:
        self._start = now, sample
        self._usages.clear()


class _Judge:
    """The windows of one life of the engine."""

    def __init__(self) -> None:
        self._kind: Kind | None = None
        self._windows: deque[_Window] = deque(maxlen=HIT_RATE_WINDOWS)
        self._hit_rates: deque[float] = deque(maxlen=BEST_WINDOWS)
        self._votes: deque[bool] = deque(maxlen=VOTING_WINDOWS)
        self._kinds: deque[Kind] = deque(maxlen=KIND_VOTES)
        """Of the last votes."""
        self._calm = 0
        """Windows in a row that were not even half of thrashing."""
        self._evictions = _Evictions()

    def close(self, window: _Window) -> ThrashState:
        """Takes the next window into account."""
        self._windows.append(window)
        drop = self._hit_rate_drop()
        vote = self._thrashes(window, drop, scale=1.0)
        self._calm = 0 if self._thrashes(window, drop, scale=0.5) else self._calm + 1
        if not _wastes(window, scale=0.5):
            self._evictions.learn(window)
        self._votes.append(vote)
        if vote:
            self._kinds.append(window.kind())
        if vote and sum(self._votes) >= VOTES:
            self._kind = self._prevailing()
        elif self._calm >= CLEARING_WINDOWS:
            self._kind = None
            self._kinds.clear()
        return ThrashState(kind=self._kind, wasted_tokens_per_second=_wasted_per_second(self._windows))

    def _prevailing(self) -> Kind:
        """The kind of most of the last votes; it changes only for one with two votes more."""
        votes = Counter(self._kinds)
        first, most = votes.most_common(1)[0]
        return self._kind if self._kind is not None and most < votes[self._kind] + 2 else first

    def _thrashes(self, window: _Window, hit_rate_drop: float, *, scale: float) -> bool:
        plain = window.wasted_share > scale * PLAIN_WASTED_SHARE
        in_cache = self._evictions.z(window) > scale * EVICTION_Z and hit_rate_drop > scale * HIT_RATE_DROP
        return _wastes(window, scale=scale) and (plain or in_cache)

    def _hit_rate_drop(self) -> float:
        """By how much the hit rate of the last windows is below its best; 0 if too little was looked up."""
        queried = sum(window.of("prefix_queries_tokens_total") for window in self._windows)
        if queried < _LEAST_QUERIED_TOKENS:
            return 0.0
        rate = sum(window.of("prefix_hits_tokens_total") for window in self._windows) / queried
        self._hit_rates.append(rate)
        return max(self._hit_rates) - rate


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _wastes(window: _Window, *, scale: float) -> bool:
    return window.restored_share > scale * RESTORED_SHARE or window.wasted_share > scale * WASTED_SHARE


def _change(first: Sample, last: Sample) -> dict[str, float]:
    pairs = ((name, getattr(first, name), getattr(last, name)) for name in _COUNTERS)
    return {name: after - before for name, before, after in pairs if before is not None and after is not None}


def _wasted_per_second(windows: Iterable[_Window]) -> float | None:
    known = [window for window in windows if "wasted_tokens_total" in window.change]
    if not known:
        return None
    return sum(window.change["wasted_tokens_total"] for window in known) / sum(window.seconds for window in known)
