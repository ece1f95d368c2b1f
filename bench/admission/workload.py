"""What clients send: four mixes of lengths, open-loop arrivals with bursts. Pure; the same seed gives the same traffic.

Arrivals are Poisson for nine tenths of the requests; the last tenth comes in bursts, once in ten seconds one second's
worth at once. Lengths are lognormal, cut at both ends. The output length is the mix's; what clients *announce* as
``max_tokens`` is not: people set round ceilings that have little to do with an answer, so it is one of three ceilings,
at random, but never below the answer. A policy sees the ceiling only.

The lengths suit an engine of 96 blocks x 32 tokens: about 25 short chats, 12 of the mixed and 6 of the long requests
fill it. No prompt takes an idle engine longer than the goal for the first token, five times the median: such a request
would be lost under any policy, and the rate at which 99 % are good would be no rate at all.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

CEILINGS = (256, 512, 1024)
"""What clients announce as ``max_tokens``; the smallest as often as the others together."""
BURST_SHARE = 0.1
BURST_EVERY_SECONDS = 10.0
BURST_SECONDS = 0.05
"""Within which the requests of one burst arrive."""
SHIFT_SECONDS = 20.0


@dataclass(frozen=True)
class Lengths:
    """A lognormal distribution of token counts, cut."""

    median: float
    sigma: float
    """Standard deviation of the logarithm."""
    smallest: int
    largest: int

    def draw(self, random_: random.Random) -> int:
        value = random_.lognormvariate(math.log(self.median), self.sigma)
        return max(self.smallest, min(self.largest, round(value)))


@dataclass(frozen=True)
class Mix:
    """A kind of traffic."""

    name: str
    prompt: Lengths
    output: Lengths


CHAT = Mix("chat", prompt=Lengths(60, 0.6, 8, 256), output=Lengths(40, 0.6, 4, 160))
MIXED = Mix("mixed", prompt=Lengths(90, 1.0, 8, 400), output=Lengths(70, 0.9, 4, 500))
LONG = Mix("long", prompt=Lengths(400, 0.35, 200, 1000), output=Lengths(50, 0.5, 4, 200))
PLAIN = (CHAT, MIXED, LONG)
SHIFT = "shift"
"""The three mixes in turn, each for SHIFT_SECONDS; a seed says where in the turn, and the window begins amid a phase."""
MIXES = (*(mix.name for mix in PLAIN), SHIFT)


@dataclass(frozen=True)
class Arrival:
    """One request to come."""

    at: float
    """Seconds from the start of the run."""
    prompt_tokens: int
    output_tokens: int
    """How long the answer is; the engine ends it there."""
    max_tokens: int
    """What the client announces."""


@dataclass(frozen=True)
class Phase:
    """A stretch of time with one mix at one rate."""

    begin: float
    end: float
    mix: Mix
    rate: float
    """Requests a second."""


def phases(mix: str, *, load: float, seconds: float, capacity: Mapping[str, float], seed: int) -> list[Phase]:
    """The phases of a run at ``load`` x the capacity of its mix.

    ``capacity``: requests a second of each plain mix, and of the shift the factor by which all of those are multiplied
    so that the whole holds: each phase is as full for its own mix.
    """
    plain = {each.name: each for each in PLAIN}
    if mix in plain:
        return [Phase(0.0, seconds, plain[mix], load * capacity[mix])]
    found, begin, turn = [], -SHIFT_SECONDS / 2, seed
    while begin < seconds:
        end = begin + SHIFT_SECONDS
        each = PLAIN[turn % len(PLAIN)]
        found.append(Phase(max(begin, 0.0), min(end, seconds), each, load * capacity[SHIFT] * capacity[each.name]))
        begin, turn = end, turn + 1
    return found


def arrivals(phases_: Sequence[Phase], *, seed: int) -> list[Arrival]:
    """The requests of a run, in order of arrival."""
    random_ = random.Random(f"arrivals {seed}")
    found = [
        _request(at, phase.mix, random_)
        for phase in phases_
        for at in (*_poisson(phase, random_), *_bursts(phase, random_))
    ]
    return sorted(found, key=lambda arrival: arrival.at)


def one_by_one(mix: str, *, count: int, seed: int) -> list[Arrival]:
    """Requests of a mix for an engine that is otherwise idle; of the shift: the plain mixes in turn."""
    random_ = random.Random(f"one by one {seed}")
    turn = PLAIN if mix == SHIFT else [each for each in PLAIN if each.name == mix]
    return [_request(0.0, turn[number % len(turn)], random_) for number in range(count)]


def _poisson(phase: Phase, random_: random.Random) -> Iterator[float]:
    at = phase.begin
    while (at := at + random_.expovariate((1 - BURST_SHARE) * phase.rate)) < phase.end:
        yield at


def _bursts(phase: Phase, random_: random.Random) -> Iterator[float]:
    """Each stretch of BURST_EVERY_SECONDS has one at a random moment; a shorter rest has one in proportion."""
    begin = phase.begin
    while begin < phase.end:
        stretch = min(BURST_EVERY_SECONDS, phase.end - begin)
        moment = begin + random_.random() * (stretch - BURST_SECONDS)
        for _ in range(round(BURST_SHARE * phase.rate * stretch)):
            yield moment + random_.random() * BURST_SECONDS
        begin += stretch


def _request(at: float, mix: Mix, random_: random.Random) -> Arrival:
    output = mix.output.draw(random_)
    (ceiling,) = random_.choices(CEILINGS, weights=(2, 1, 1))
    return Arrival(
        at=at,
        prompt_tokens=mix.prompt.draw(random_),
        output_tokens=output,
        max_tokens=max(ceiling, min(each for each in CEILINGS if each >= output)),
    )
