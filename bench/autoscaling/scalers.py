"""What the simulation shows to a scaler, and the two kinds that there are: a peer's policy, and our law.

Both see the same figures of the same scrape. The queue in front of the engine counts as the engine's own for a peer, and what
our admission refuses is counted beside what it lets in, for laws that ask how many requests came.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from bench.autoscaling.policy import Engine, Fleet, ForwardPass, Policy
from kvplane_operator.autoscaler.history import History, fresh
from kvplane_operator.autoscaler.law import decide
from kvplane_operator.autoscaler.settings import Settings
from kvplane_operator.autoscaler.signals import Reading, Replica, Signals


@dataclass(frozen=True, slots=True, kw_only=True)
class Scraped:
    """One replica's figures at one moment."""

    at: float
    kv_tokens: float
    used_tokens: float
    reserved_tokens: float
    queued_tokens: float
    """KV that those that wait are expected to hold."""
    queued_prompt_tokens: float
    running: int
    waiting: int
    admitted: int
    refused: int
    shed_tokens: float
    prompt_tokens: float
    prefix_hits_tokens: float
    generation_tokens: float
    kept: int
    broken: int
    lost_tokens_per_second: float
    mean_prompt_tokens: float
    peak_usage: float
    peak_waiting: int
    max_batched_tokens: int
    max_sequences: int
    forward_pass: ForwardPass | None


@dataclass(frozen=True, slots=True)
class Seen:
    """One replica; those that drain are not shown."""

    name: str
    created_at: float
    ready: bool
    scraped: Scraped | None


class Scaler(Protocol):
    """Decides, and remembers by itself."""

    @property
    def name(self) -> str: ...

    @property
    def tick_seconds(self) -> float: ...

    def decide(self, asked: int, replicas: list[Seen], now: float) -> int:
        """Replicas to ask for, within the bounds."""


class PeerScaler:
    """A peer's policy within our bounds."""

    def __init__(self, policy: Policy, *, lowest: int, highest: int) -> None:
        self._policy = policy
        self._bounds = (lowest, highest)
        self._memory: Any = None
        self._started = False

    @property
    def name(self) -> str:
        return self._policy.name

    @property
    def tick_seconds(self) -> float:
        return self._policy.tick_seconds

    def decide(self, asked: int, replicas: list[Seen], now: float) -> int:
        fleet = Fleet(asked, [_engine(seen) for seen in replicas if seen.ready])
        if not self._started:
            self._memory, self._started = self._policy.start(fleet, now), True
        wanted, self._memory = self._policy.decide(fleet, self._memory, now)
        lowest, highest = self._bounds
        return min(max(wanted, lowest), highest)


class OurScaler:
    """The law of the operator."""

    name = "kvplane"

    def __init__(self, settings: Settings, *, stale_seconds: float = 30.0) -> None:
        """Figures older than ``stale_seconds`` are missing."""
        self._settings = settings
        self._stale_seconds = stale_seconds
        self._history: History = fresh(settings.tuning)

    @property
    def tick_seconds(self) -> float:
        return self._settings.tuning.tick_seconds

    def decide(self, asked: int, replicas: list[Seen], now: float) -> int:
        shown = tuple(
            Replica(
                name=seen.name,
                created_at=seen.created_at,
                ready=seen.ready,
                reading=self._reading(seen.scraped, now),
            )
            for seen in replicas
        )
        decision = decide(Signals(asked=asked, replicas=shown), self._history, self._settings, now)
        self._history = decision.history
        return decision.desired

    def _reading(self, scraped: Scraped | None, now: float) -> Reading | None:
        if scraped is None or now - scraped.at > self._stale_seconds:
            return None
        return _reading(scraped)


def _engine(seen: Seen) -> Engine | None:
    scraped = seen.scraped
    if scraped is None:
        return None
    return Engine(
        name=seen.name,
        kv_cache_usage=scraped.used_tokens / scraped.kv_tokens,
        running=scraped.running,
        waiting=scraped.waiting,
        waiting_prompt_tokens=int(scraped.queued_prompt_tokens),
        kv_tokens=int(scraped.kv_tokens),
        mean_prompt_tokens=scraped.mean_prompt_tokens,
        peak_kv_cache_usage=scraped.peak_usage,
        peak_waiting=scraped.peak_waiting,
        max_batched_tokens=scraped.max_batched_tokens,
        max_sequences=scraped.max_sequences,
        forward_pass=scraped.forward_pass,
        admitted_total=float(scraped.admitted),
        refused_total=float(scraped.refused),
        prompt_tokens_total=scraped.prompt_tokens,
        generation_tokens_total=scraped.generation_tokens,
    )


def _reading(scraped: Scraped) -> Reading:
    return Reading(
        at=scraped.at,
        capacity_tokens=scraped.kv_tokens,
        held_tokens=max(scraped.used_tokens, scraped.reserved_tokens),
        queued_tokens=scraped.queued_tokens,
        queued_prompt_tokens=scraped.queued_prompt_tokens,
        running=float(scraped.running),
        queued=float(scraped.waiting),
        admitted_total=float(scraped.admitted),
        refused_total=float(scraped.refused),
        shed_tokens_total=scraped.shed_tokens,
        prompt_tokens_total=scraped.prompt_tokens,
        prefix_hits_tokens_total=scraped.prefix_hits_tokens,
        generation_tokens_total=scraped.generation_tokens,
        kept_total=float(scraped.kept),
        broken_total=float(scraped.broken),
        wasted_tokens_per_second=scraped.lost_tokens_per_second,
    )
