"""What letting one more request in costs those that run, in requests that would miss their promised time per token.

A prefill delays the next token of every running request, and one more sequence makes every later step longer. What a
request can bear depends on how far it is and on how many tokens are still to come, over which the delay is averaged: an
output that ends in ten tokens has no time to make up for a long prompt beside it. So for each request that runs this asks
how long its output has to get to keep its promise, with and without the new one,

    L = (elapsed + prefill to come + T - tokens so far x step) / (T - step)         T promised, step without prefills

and how likely it is to end between the two, after its length curve. The sum is the expected number of requests that the
new one, itself worth one at most, makes miss. It is let in while that is small: waiting costs nothing before its own time
runs out, and running requests end meanwhile.

Most requests could end now and keep their promise whatever one more does to them. How long each could still be held up and
do so is its *slack*,

    (tokens so far - 1) x T - elapsed

and only those are looked at that have less of it than the delay in question: few, beside 500 that are well.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Final

from kvplane_runtime.admission.inflight import Running

MOST_MISSES: Final = 0.2
"""That a request may cause."""


@dataclass(frozen=True, slots=True)
class Cost:
    """A new request beside those that run; all in seconds."""

    promised: float
    """Per token, on average over an output."""
    step: float
    """Of the engine without prefills, as it runs now."""
    slower_step: float
    """The same with the new request; below ``promised``."""
    under_way: float
    """Prefills sent and not computed yet."""
    stall: float
    """The new request's prefill."""


class Slacks:
    """The requests that have their first token, by slack."""

    def __init__(self) -> None:
        self._order: list[tuple[float, int, Running]] = []
        """Slack, a number that is nobody else's, the request; ascending."""
        self._places: dict[Running, tuple[float, int, Running]] = {}
        self._numbers = count()
        self._promised = 0.0

    def put(self, running: Running) -> None:
        """A request has its first token, or more tokens."""
        self.take(running)
        place = (_slack(running, self._promised), next(self._numbers), running)
        self._places[running] = place
        insort(self._order, place)

    def take(self, running: Running) -> None:
        """A request is over; nothing where it is not known."""
        place = self._places.pop(running, None)
        if place is not None:
            del self._order[bisect_left(self._order, place)]

    def below(self, delay: float, *, promised: float) -> Iterator[Running]:
        """The requests with less slack than ``delay`` seconds at the promised time per token, the least first."""
        if promised != self._promised:
            self._promised = promised
            for running in list(self._places):
                self.put(running)
        for slack, _, running in self._order:
            if slack >= delay:
                break
            yield running


def _slack(running: Running, promised: float) -> float:
    first, entry = running.entry.first_token_at, running.entry
    assert first is not None  # noqa: S101  (only those that have their first token are in order)
    return (max(1.0, entry.generated / entry.demand.outputs) - 1.0) * promised - (running.last_at - first)


def newly_missed(running: Iterable[Running], cost: Cost, *, enough: float) -> float:
    """Expected number of requests that would miss their promise and now do not; counting stops above ``enough``."""
    promised, own = cost.promised, cost.stall
    room, less_room = promised - cost.step, promised - cost.slower_step
    missed = 0.0
    for one in running:
        first = one.entry.first_token_at
        if first is None:
            continue
        done = max(1.0, one.entry.generated / one.entry.demand.outputs)
        late = one.last_at - first + cost.under_way + promised
        if late + own <= done * promised:
            continue  # it keeps its promise even if it ends at once
        needed = max(done, (late - done * cost.step) / room)
        then = max(done, (late + own - done * cost.slower_step) / less_room)
        missed += (_reaches(one, needed) - _reaches(one, then)) / one.curve.exceeds(done)
        if missed > enough:
            break
    return missed


def _reaches(one: Running, length: float) -> float:
    """P(an output gets longer than ``length``, or is cut off there)."""
    return 0.0 if one.limit is not None and length > one.limit else one.curve.exceeds(length)
