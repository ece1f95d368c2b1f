"""Traffic that autoscaling is judged by: the Azure hours as they are, stretched, under a day's envelope, and in steps. Pure.

Raw, the bursts of those hours are shorter than a start: no scaler can follow them, only headroom meets them. Stretched by
four they last minutes, so that scaling pays; a day's envelope moves the mean by five; steps come without a warning; on steady
load nothing should move. Every variant is made of real requests, and a seed decides which, as in
``bench.admission.replay.traces``.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from bench.admission.replay.traces import Arrival, Line, arrivals

STRETCH: Final = 4
_JITTER_SECONDS: Final = 8.0
"""Between copies of a request: less than any start, more than a prompt."""
_LOOPS: Final = 4
_NIGHT: Final = 0.2
"""Of the day's highest rate."""
STEPS: Final = (1.0, 3.0, 1.0, 5.0, 2.0, 1.0)
"""Times the lowest rate, each for STEP_SECONDS."""
STEP_SECONDS: Final = 1200.0
_STEADY_STEPS: Final = 3


def raw(trace: Sequence[Line], *, rate: float, seed: int) -> list[Arrival]:
    """The hour at ``rate`` requests a second on average."""
    return arrivals(trace, rate=rate, seed=seed)


def stretched(trace: Sequence[Line], *, rate: float, seed: int) -> list[Arrival]:
    """The hour in four, with as many requests a second: each comes four times, some seconds apart."""
    random_ = random.Random(f"stretched {seed}")
    slow = arrivals(trace, rate=rate / STRETCH, seed=seed)
    copies = [replace(each, at=each.at + random_.uniform(0, _JITTER_SECONDS)) for each in slow for _ in range(STRETCH)]
    return sorted(copies, key=lambda each: each.at)


def diurnal(trace: Sequence[Line], *, rate: float, seed: int) -> list[Arrival]:
    """Four times the hour, one after the other, thinned to a day's wave with ``rate`` at its top."""
    random_ = random.Random(f"diurnal {seed}")
    hour = arrivals(trace, rate=rate, seed=seed)
    length = hour[-1].at + 1 / rate
    day = [replace(each, at=each.at + loop * length) for loop in range(_LOOPS) for each in hour]
    return [each for each in day if random_.random() < wave(each.at / (_LOOPS * length))]


def wave(share_of_day: float) -> float:
    """From _NIGHT at both ends of the day to 1 at its middle."""
    return _NIGHT + (1 - _NIGHT) * (1 - math.cos(2 * math.pi * share_of_day)) / 2


def steps(trace: Sequence[Line], *, rate: float, seed: int) -> list[Arrival]:
    """Poisson arrivals at the levels of STEPS, ``rate`` on average, with the lengths of the trace's requests."""
    random_ = random.Random(f"steps {seed}")
    lengths = arrivals(trace, rate=rate, seed=seed)
    lowest = rate * len(STEPS) / sum(STEPS)
    return [
        arrival
        for number, level in enumerate(STEPS)
        for arrival in _poisson(random_, lengths, rate=lowest * level, begin=number * STEP_SECONDS)
    ]


def steady(trace: Sequence[Line], *, rate: float, seed: int) -> list[Arrival]:
    """Poisson arrivals at one rate, as long as three steps, with the lengths of the trace's requests."""
    random_ = random.Random(f"steady {seed}")
    lengths = arrivals(trace, rate=rate, seed=seed)
    return [
        arrival
        for number in range(_STEADY_STEPS)
        for arrival in _poisson(random_, lengths, rate=rate, begin=number * STEP_SECONDS)
    ]


def _poisson(random_: random.Random, lengths: Sequence[Arrival], *, rate: float, begin: float) -> list[Arrival]:
    """For STEP_SECONDS from ``begin`` on."""
    made, at = [], begin
    while (at := at + random_.expovariate(rate)) < begin + STEP_SECONDS:
        made.append(replace(random_.choice(lengths), at=at))
    return made


Variant = Callable[..., list[Arrival]]
VARIANTS: Final[dict[str, Variant]] = {
    "raw": raw,
    "stretched": stretched,
    "diurnal": diurnal,
    "steps": steps,
    "steady": steady,
}
FOLLOWED: Final = ("stretched", "diurnal", "steps")
"""Those whose load a scaler can follow, and by which the scalers are compared."""
