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

from bench.admission.replay.traces import KEPT, Line, arrivals
from bench.admission.workload import Arrival

TUNING_SHARE: Final = 1 / 3
STRETCH: Final = 4
_JITTER_SECONDS: Final = 8.0
"""Between a request and its copies: less than any start, more than a prompt."""
_LOOPS: Final = 4
_NIGHT: Final = 0.2
"""Of the day's highest rate."""
STEPS: Final = (1.0, 3.0, 1.0, 5.0, 2.0, 1.0)
"""Times the lowest rate, each for STEP_SECONDS."""
STEP_SECONDS: Final = 1200.0
_STEADY_STEPS: Final = 3


def window(trace: Sequence[Line], *, tuning: bool) -> list[Line]:
    """The first third of the hour, on which settings are chosen, or the rest, on which they are judged; each from 0 on."""
    end = TUNING_SHARE * trace[-1].at
    found = [line for line in trace if (line.at < end) == tuning]
    return [replace(line, at=line.at - found[0].at) for line in found]


def raw(trace: Sequence[Line], *, rate: float, seed: int) -> list[Arrival]:
    """The trace by its own clock, at ``rate`` requests a second on average."""
    return _by_its_clock(trace, rate=rate, seed=seed, slower=1)


def stretched(trace: Sequence[Line], *, rate: float, seed: int) -> list[Arrival]:
    """The trace in four times its time, with as many requests a second."""
    return _by_its_clock(trace, rate=rate, seed=seed, slower=STRETCH)


def diurnal(trace: Sequence[Line], *, rate: float, seed: int) -> list[Arrival]:
    """Four times the trace, one after the other, thinned to a day's wave with ``rate`` at its top."""
    random_ = random.Random(f"diurnal {seed}")
    once = raw(trace, rate=rate, seed=seed)
    length = once[-1].at + 1 / rate
    day = [replace(each, at=each.at + loop * length) for loop in range(_LOOPS) for each in once]
    return [each for each in day if random_.random() < wave(each.at / (_LOOPS * length))]


def _by_its_clock(trace: Sequence[Line], *, rate: float, seed: int, slower: int) -> list[Arrival]:
    """Bursts last as long as they did, times ``slower``; the rate comes by leaving requests out, or by copies soon after them."""
    random_ = random.Random(f"copies {slower} {seed}")
    own_rate = KEPT * len(trace) / trace[-1].at / slower
    whole, rest = divmod(rate / own_rate, 1.0)
    made = []
    for each in arrivals(trace, rate=own_rate, seed=seed):
        for copy in range(int(whole) + (random_.random() < rest)):
            made.append(replace(each, at=each.at + (random_.uniform(0, _JITTER_SECONDS) if copy else 0.0)))
    return sorted(made, key=lambda each: each.at)


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
