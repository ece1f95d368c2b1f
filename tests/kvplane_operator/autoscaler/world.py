"""A service whose replicas share whatever demand there is, and a clock: enough to see what a law does over time."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, Final

from kvplane_operator.autoscaler.history import History, fresh
from kvplane_operator.autoscaler.law import Decision, decide
from kvplane_operator.autoscaler.settings import Settings, Tuning
from kvplane_operator.autoscaler.signals import Reading, Replica, Signals
from kvplane_operator.autoscaler.victims import order

START: Final = 1_700_000_000.0
TUNING: Final = Tuning()
CAPACITY: Final = 100_000.0
USABLE: Final = 85_000.0
"""Of CAPACITY, with nothing learned and kappa 1: what counts as one replica."""
REQUESTS: Final = 100.0
"""In each replica that has work: enough that their number limits nothing."""


def reading(load: float = 0.0, queue: float = 0.0, *, at: float = START, **changes: Any) -> Reading:
    """Of a replica that holds ``load`` and queues ``queue``, both in replicas."""
    usual = Reading(
        at=at,
        capacity_tokens=CAPACITY,
        held_tokens=load * USABLE,
        queued_tokens=queue * USABLE,
        running=REQUESTS if load else 0.0,
        queued=REQUESTS if queue else 0.0,
    )
    return replace(usual, **changes)


def replica(name: str = "a", *, ready: bool = True, created_at: float = START - 3600, **fields: Any) -> Replica:
    return Replica(name=name, ready=ready, created_at=created_at, **fields)


def signals(*readings: Reading | None, asked: int | None = None, **fields: Any) -> Signals:
    """Ready replicas with these readings, by default as many as are asked for."""
    replicas = tuple(replica(f"r{number}", reading=each) for number, each in enumerate(readings))
    return Signals(asked=len(replicas) if asked is None else asked, replicas=replicas, **fields)


def watched(history: History, *, now: float = START) -> History:
    """As if all signals had been there for a day."""
    return replace(history, began_at=now - 86_400, decided_at=now - 5, watched_since=now - 86_400, watched_at=now - 5)


class World:
    """``demand`` gives replicas by seconds since START; what does not fit waits."""

    def __init__(
        self,
        demand: Callable[[float], float],
        *,
        settings: Settings | None = None,
        replicas: int = 1,
        startup: float = 60.0,
    ) -> None:
        self.demand = demand
        self.settings = settings or Settings(max_replicas=50)
        self.startup = startup
        self.now = START
        self.history = fresh(TUNING)
        self.created = {f"old-{number}": START - 3600 for number in range(replicas)}
        self.born = 0
        self.blind: Callable[[str], bool] = lambda _: False
        self.crashes: Callable[[str], bool] = lambda _: False
        """Replicas that are never ready."""
        self.wake = False
        self.admitted = 0.0

    def signals(self) -> Signals:
        ready = [name for name, at in self.created.items() if at + self.startup <= self.now and not self.crashes(name)]
        share = self.demand(self.now - START) / len(ready) if ready else 0.0
        held = min(share, CAPACITY / USABLE)
        read = reading(
            held, share - held, at=self.now, admitted_total=self.admitted, refused_total=0.0, shed_tokens_total=0.0
        )
        return Signals(
            asked=len(self.created),
            wake=self.wake,
            replicas=tuple(
                replica(
                    name,
                    ready=name in ready,
                    created_at=at,
                    reading=read if name in ready and not self.blind(name) else None,
                )
                for name, at in self.created.items()
            ),
        )

    def step(self) -> Decision:
        """One decision, carried out, and the time until the next."""
        seen = self.signals()
        decision = decide(seen, self.history, self.settings, self.now)
        self.history = decision.history
        for name in order(seen.replicas)[: max(0, len(self.created) - decision.desired)]:
            del self.created[name]
        while len(self.created) < decision.desired:
            self.born += 1
            self.created[f"new-{self.born}"] = self.now
        self.admitted += 10 * TUNING.tick_seconds if self.demand(self.now - START) else 0.0
        self.now += TUNING.tick_seconds
        return decision

    def run(self, seconds: float) -> list[Decision]:
        """Decisions until so much time has gone."""
        until = self.now + seconds
        decisions = []
        while self.now < until:
            decisions.append(self.step())
        return decisions


def reversals(decisions: list[Decision], *, first: int) -> int:
    """How often the direction of change turned."""
    counts = [first, *(decision.desired for decision in decisions)]
    moves = [after - before for before, after in pairwise(counts) if after != before]
    return sum((before > 0) != (after > 0) for before, after in pairwise(moves))
