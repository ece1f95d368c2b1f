"""Rates from counters: of each replica, between its last two readings.

A counter that went back (the sidecar or engine was restarted) gives no rate until the next reading. Readings come every
few seconds, decisions perhaps more often: between two readings the last rates stand.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from kvplane_operator.autoscaler.signals import Reading, Replica

_LEAST_SECONDS: Final = 0.5
"""Closer readings are too short to count events in."""
_MOST_SECONDS: Final = 60.0
"""Readings further apart say nothing of now."""
_PACE_SECONDS: Final = 10.0
"""Time constant of a replica's pace."""
_MOST_RATE: Final = 1e9
"""Tokens or requests per second that no replica reaches: a counter that was set, not counted."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Per second; ``None``: not known."""

    admitted: float | None = None
    refused: float | None = None
    shed_tokens: float | None = None
    prompt_tokens: float | None = None
    """Computed: what the prefix cache has costs nothing."""
    generation_tokens: float | None = None
    kept: float | None = None
    """Answers that kept their promises."""
    broken: float | None = None


UNKNOWN: Final = Rates()


@dataclass(frozen=True, slots=True)
class Meter:
    """One replica's last reading, and the rates up to it."""

    reading: Reading
    rates: Rates = UNKNOWN
    kept_waiting: bool = False
    """Whether requests waited at both ends: the replica worked at its limit in between."""
    pace: float | None = None
    """Prompt tokens computed per second, over some readings: an engine counts a prompt when all of it is computed. ``None``:
    not known yet."""


def metered(meters: Mapping[str, Meter], replicas: Iterable[Replica]) -> dict[str, Meter]:
    """The meters of ``replicas``, brought up to their readings; those of others are forgotten."""
    renewed: dict[str, Meter] = {}
    for replica in replicas:
        before, reading = meters.get(replica.name), replica.reading
        if reading is None:
            if before is not None:
                renewed[replica.name] = Meter(before.reading, pace=before.pace)
        elif before is None:
            renewed[replica.name] = Meter(reading)
        else:
            renewed[replica.name] = _renewed(before, reading)
    return renewed


def _renewed(before: Meter, reading: Reading) -> Meter:
    old = before.reading
    seconds = reading.at - old.at
    if 0 <= seconds < _LEAST_SECONDS:
        return before
    if not 0 < seconds <= _MOST_SECONDS:
        return Meter(reading)
    rates = Rates(
        admitted=_rate(old.admitted_total, reading.admitted_total, seconds),
        refused=_rate(old.refused_total, reading.refused_total, seconds),
        shed_tokens=_rate(old.shed_tokens_total, reading.shed_tokens_total, seconds),
        prompt_tokens=_computed(old, reading, seconds),
        generation_tokens=_rate(old.generation_tokens_total, reading.generation_tokens_total, seconds),
        kept=_rate(old.kept_total, reading.kept_total, seconds),
        broken=_rate(old.broken_total, reading.broken_total, seconds),
    )
    return Meter(
        reading,
        rates,
        kept_waiting=old.queued > 0 and reading.queued > 0,
        pace=_smoothed(before.pace, rates.prompt_tokens, seconds),
    )


def _smoothed(before: float | None, seen: float | None, seconds: float) -> float | None:
    if before is None or seen is None:
        return before if seen is None else seen
    return before + (1 - math.exp(-seconds / _PACE_SECONDS)) * (seen - before)


def _computed(old: Reading, reading: Reading, seconds: float) -> float | None:
    """vLLM counts hits when a prompt is scheduled and the prompt when it is computed, so in a short time there may be more hits."""
    prompts = _rate(old.prompt_tokens_total, reading.prompt_tokens_total, seconds)
    hits = _rate(old.prefix_hits_tokens_total, reading.prefix_hits_tokens_total, seconds)
    return None if prompts is None else max(0.0, prompts - (hits or 0.0))


def _rate(before: float | None, after: float | None, seconds: float) -> float | None:
    if before is None or after is None or after < before:
        return None
    rate = (after - before) / seconds
    return rate if rate <= _MOST_RATE else None
