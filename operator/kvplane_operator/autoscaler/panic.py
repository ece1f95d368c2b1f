"""Overload: what shows it, how long it is taken to last, and how its replicas go afterwards.

In a panic nothing limits going up and nothing goes down. It begins when an overload has lasted for ``panic_seconds``, and
lasts until none was seen for a start-up time. What it brought goes in a straight line from the first moment at which the
law lets it go, not at once: an overload often comes back (knative/serving#3153, #9121).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from kvplane_operator.autoscaler.settings import Tuning

_ROUNDING: Final = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What an overload is seen by."""

    demand: float
    ready: int
    coming: float
    """Replicas ready when the forecast falls due."""
    forecast: float
    reach: float
    """How much more than planned a replica takes at most: kappa over the usable share."""
    shed_share: float
    waste: float
    """Replicas that are busy with work done before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panic:
    """State between decisions."""

    seen_since: float | None = None
    """Since when an overload is seen in every decision; ``None``: it is not."""
    until: float | None = None
    """``None``: no panic."""
    peak: int | None = None
    """Most replicas asked for since the last panic began, while some of them are left to go; ``None``: none are."""
    gliding_since: float | None = None
    """Since when they go; ``None``: the law still needs them all."""


Check = Callable[[Load, Tuning], str | None]


def demand_above_ready(load: Load, tuning: Tuning) -> str | None:
    """Work for far more replicas than serve."""
    if not load.ready or load.demand < tuning.panic_ratio * load.ready:
        return None
    return f"demand is {load.demand / load.ready:.1f} times what serves"


def refusals(load: Load, tuning: Tuning) -> str | None:
    """Admission refuses for want of room."""
    return f"{load.shed_share:.0%} of the requests are refused" if load.shed_share > tuning.panic_shed else None


def misses_forecast(load: Load, tuning: Tuning) -> str | None:
    """More is forecast than will fit, with all that is on its way."""
    if load.forecast <= 0:
        return None
    missed = 1 - load.coming * load.reach / load.forecast
    return f"{missed:.0%} of the demand is forecast to find no room" if missed > tuning.panic_misses else None


def thrash(load: Load, _: Tuning) -> str | None:
    """An engine computes again what it had computed."""
    return f"thrash takes {load.waste:.2f} replicas" if load.waste > 0 else None


CHECKS: Final[tuple[Check, ...]] = (demand_above_ready, refusals, misses_forecast, thrash)


def overload(load: Load, tuning: Tuning) -> str | None:
    """What shows an overload; ``None``: nothing does."""
    return next((cause for check in CHECKS if (cause := check(load, tuning))), None)


def renewed(panic: Panic, *, seen: bool, lasts_seconds: float, now: float, tuning: Tuning) -> Panic:
    """The state after a decision's look; ``lasts_seconds``: the shortest panic."""
    since = None if not seen else now if panic.seen_since is None else min(panic.seen_since, now)
    if since is not None and now - since >= tuning.panic_seconds:
        return replace(panic, seen_since=since, until=now + lasts_seconds)
    until = None if panic.until is None or panic.until <= now else min(panic.until, now + lasts_seconds)
    return replace(panic, seen_since=since, until=until)


def raised(panic: Panic, *, desired: int) -> Panic:
    """The state after replicas were asked for that are not to go yet."""
    if panic.until is None and panic.peak is None:
        return replace(panic, gliding_since=None)
    return replace(panic, peak=max(desired, panic.peak or 0), gliding_since=None)


def lowered(panic: Panic, *, asked: int, low: int, lasts_seconds: float, now: float) -> tuple[int, Panic]:
    """How far from ``asked`` towards ``low``, below it, replicas may go now, and the state afterwards."""
    if panic.peak is None or lasts_seconds <= 0:
        return low, replace(panic, peak=None, gliding_since=None)
    since = now if panic.gliding_since is None else min(panic.gliding_since, now)
    left = 1 - (now - since) / lasts_seconds
    if left <= 0 or panic.peak <= low:
        return low, replace(panic, peak=None, gliding_since=None)
    reached = math.ceil(low + (panic.peak - low) * left - _ROUNDING)
    return min(asked, reached), replace(panic, gliding_since=since)
