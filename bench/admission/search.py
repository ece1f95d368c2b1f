"""The highest rate that an engine without admission still serves, by bisection. Pure: the caller does the probing.

The answer is a rate that passed, with one that failed at most STEP above it. Rates are compared by their ratio.
"""

from collections.abc import Sequence
from dataclasses import dataclass

STEP = 1.08
WIDEN = 1.5


@dataclass(frozen=True)
class Probe:
    """One run at one rate."""

    rate: float
    passed: bool


def next_rate(probes: Sequence[Probe], *, first: float) -> float | None:
    """What to probe next; None when the search is over.

    Up or down by WIDEN until one rate has passed and one failed, then their geometric mean.
    """
    if not probes:
        return first
    passed = best(probes)
    failed = min((probe.rate for probe in probes if not probe.passed and probe.rate > (passed or 0.0)), default=None)
    if passed is None:
        return min(probe.rate for probe in probes) / WIDEN
    if failed is None:
        return passed * WIDEN
    return (passed * failed) ** 0.5 if failed / passed > STEP else None


def best(probes: Sequence[Probe]) -> float | None:
    """The highest rate that passed; None where none did."""
    return max((probe.rate for probe in probes if probe.passed), default=None)
