"""What experience says of one service's replicas: how full they can be, how fast they compute prompts, how long requests stay.

*Usable share* u*: the highest share of KV memory at which the service keeps its promises. While demand stays within the
plan, work that is lost to preemption, or requests that are refused, say that the plan was too full; ten minutes near it
without either say that there is room. What happens beyond the plan, as in a burst, says nothing about it.

*Prefill rate*: computed prompt tokens per second of a replica that had requests waiting all the time and KV to spare, so that KV
memory was not what they waited for. It rises at once and falls slowly: a pause in the load makes it look too low. One that is
too low keeps so many replicas that nobody waits, and would never be seen again: so while prompts are what replicas are asked for
and nothing shows the rate, it rises by itself, until fewer replicas show it or KV memory is what counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from kvplane_operator.autoscaler.flows import Meter, Rates
from kvplane_operator.autoscaler.room import Answers, Room
from kvplane_operator.autoscaler.settings import Tuning
from kvplane_operator.autoscaler.signals import Reading, Signals

_WINDOW_SECONDS: Final = 600.0
_NEAR: Final = 0.05
"""How close below the plan counts as having tried it."""
_NEAR_SECONDS: Final = 60.0
"""For how long of a window it must have been tried."""
_WASTED_SHARE: Final = 0.005
"""Of all tokens: above it the plan was too full."""
_REFUSED_SHARE: Final = 0.01
"""Of all requests: above it too."""
_RAISE: Final = 0.01
_LOWER: Final = 0.03
_KV_SPARE: Final = 0.9
"""Of kappa x capacity: below it requests wait for something other than KV memory."""
_LEAST_RATE: Final = 1.0
"""Tokens per second; less is a replica that stands still."""
_RATE_UP: Final = 0.5
_RATE_DOWN: Final = 0.02
_RATE_FORGOTTEN_SECONDS: Final = 12 * 3600.0
"""In which it rises e-fold while nothing shows it: a ninth part in an hour, so that a rate that is right is not lost between two
bursts."""
_RESIDENCE_WEIGHT: Final = 0.1
_LEAST_RESIDENCE: Final = 0.1
_MOST_RESIDENCE: Final = 3600.0
FIRST_RESIDENCE: Final = 10.0
"""Seconds a request stays, before one was seen: some hundred tokens at a usual pace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usable:
    """The usable share of KV memory, and the window in which it is being tried."""

    share: float
    since: float | None = None
    near_seconds: float = 0.0
    tokens: float = 0.0
    wasted: float = 0.0
    requests: float = 0.0
    refused: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """All that was learned."""

    usable: Usable
    prefill_tokens_per_second: float | None = None
    """Of one replica; ``None``: no replica was ever kept busy by prompts alone."""
    residence_seconds: float = FIRST_RESIDENCE
    room: Room = field(default_factory=Room)


def learn(
    learned: Learned,
    *,
    signals: Signals,
    meters: Mapping[str, Meter],
    prompts_lead: bool,
    seconds: float,
    now: float,
    tuning: Tuning,
) -> Learned:
    """What was learned, after ``seconds`` more that ended with these signals.

    ``prompts_lead``: it is prompts, not KV memory, that more than one replica may be kept for.
    """
    met = [
        (replica.reading, meter.rates)
        for replica in signals.ready
        if replica.reading is not None and (meter := meters.get(replica.name)) is not None
    ]
    prefill, shown = learned.prefill_tokens_per_second, False
    for replica in signals.ready:
        if (meter := meters.get(replica.name)) is None or replica.reading is None:
            continue
        if (seen := _kept_busy(replica.reading, meter)) is not None:
            prefill, shown = _prefill(prefill, seen), True
    if prefill is not None and prompts_lead and not shown:
        prefill *= 1 + seconds / _RATE_FORGOTTEN_SECONDS
    return replace(
        learned,
        usable=_usable(learned.usable, met, seconds=seconds, now=now, tuning=tuning),
        prefill_tokens_per_second=prefill,
        residence_seconds=_residence(learned.residence_seconds, met),
        room=learned.room.noted(
            [
                meter.pace
                for replica in signals.ready
                if (meter := meters.get(replica.name)) is not None and meter.pace is not None
            ],
            Answers(
                kept=seconds * sum(rates.kept or 0.0 for _, rates in met),
                broken=seconds * sum(rates.broken or 0.0 for _, rates in met),
            ),
            seconds=seconds,
            now=now,
        ),
    )


def _kept_busy(reading: Reading, meter: Meter) -> float | None:
    """The rate of a replica that prompts alone kept busy; None where it shows none."""
    seen = meter.rates.prompt_tokens
    spare = reading.held_tokens < _KV_SPARE * reading.kappa * reading.capacity_tokens
    waited = meter.kept_waiting and reading.queued_prompt_tokens + reading.waiting_prompt_tokens > 0
    if seen is None or seen < _LEAST_RATE or not spare or not waited:
        return None
    return seen


def _prefill(rate: float | None, seen: float) -> float:
    if rate is None:
        return seen
    return rate + (_RATE_UP if seen > rate else _RATE_DOWN) * (seen - rate)


def _residence(residence: float, met: list[tuple[Reading, Rates]]) -> float:
    """Little's law over all replicas: requests in the engines over requests let in per second."""
    admitted = sum(rates.admitted or 0.0 for _, rates in met)
    running = sum(reading.running for reading, rates in met if rates.admitted is not None)
    if not admitted or not running:
        return residence
    seen = min(max(running / admitted, _LEAST_RESIDENCE), _MOST_RESIDENCE)
    return residence + _RESIDENCE_WEIGHT * (seen - residence)


def _usable(usable: Usable, met: list[tuple[Reading, Rates]], *, seconds: float, now: float, tuning: Tuning) -> Usable:
    if usable.since is None or now < usable.since:
        return Usable(share=usable.share, since=now)
    if now - usable.since >= _WINDOW_SECONDS:
        return Usable(share=_judged(usable, tuning), since=now)
    capacity = sum(reading.capacity_tokens for reading, _ in met)
    if not capacity:
        return usable
    fill = sum(reading.held_tokens for reading, _ in met) / capacity
    if fill > usable.share:
        return usable
    admitted = sum(rates.admitted or 0.0 for _, rates in met)
    refused = sum((rates.refused or 0.0) if rates.shed_tokens else 0.0 for _, rates in met)
    wasted = sum(reading.wasted_tokens_per_second for reading, _ in met)
    tokens = sum((rates.prompt_tokens or 0.0) + (rates.generation_tokens or 0.0) for _, rates in met)
    return replace(
        usable,
        near_seconds=usable.near_seconds + (seconds if fill >= usable.share - _NEAR else 0.0),
        tokens=usable.tokens + seconds * (tokens + wasted),
        wasted=usable.wasted + seconds * wasted,
        requests=usable.requests + seconds * (admitted + refused),
        refused=usable.refused + seconds * refused,
    )


def _judged(usable: Usable, tuning: Tuning) -> float:
    """The share after a window."""
    if usable.wasted > _WASTED_SHARE * usable.tokens or usable.refused > _REFUSED_SHARE * usable.requests:
        return max(tuning.usable_least, usable.share - _LOWER)
    if usable.near_seconds >= _NEAR_SECONDS:
        return min(tuning.usable_most, usable.share + _RAISE)
    return usable.share
