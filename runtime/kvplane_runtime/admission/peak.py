"""Gate A's arithmetic: how many KV blocks the requests in flight will need at their common peak.

Each request is a *profile*: mean and variance of the blocks it holds at each of a fixed ladder of moments from now,
counted in decode steps. While an output lives it grows by a token per step; how long it lives is random, after the curve
of :mod:`lengths`. Requests are independent, so the ladder adds up, and the peak of a set is

    M = max over moments t of  E[held(t)] + z * sqrt(Var[held(t)])

It is the Past-Future scheduler's peak (arXiv 2507.10150, eq. 3; LightLLM's router), which looks at the moments where an
output of known length ends, written for lengths known by distribution: with certain lengths both are the same number.
Adding a quantile per request, as that paper does, sets aside the margin n times where the sum needs it about sqrt(n) times.

Means and variances are whole numbers of 2^-10, so that adding and removing in any order ends at exactly 0.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from kvplane_runtime.admission.lengths import Curve

ONE: Final = 1 << 10
"""One block (or, of variances, one block squared) in the units of a profile."""
_LEAST_SHARE: Final = 1 / 256
"""Outputs less likely than this to be alive are taken as over."""


def _moments() -> tuple[int, ...]:
    """0, 4, 8, ... 32, then each a quarter more than the last, up to about 250,000 decode steps."""
    moments = list(range(0, 33, 4))
    while moments[-1] < 250_000:
        moments.append(moments[-1] * 5 // 4)
    return tuple(moments)


MOMENTS: Final = _moments()
_MIDDLES: Final = (0.0, *((a + b) / 2 for a, b in pairwise(MOMENTS)))
"""Where a step of the ladder asks whether an output still lives: half way up to it."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Blocks that one request will hold at each of ``MOMENTS``; 0 beyond the end."""

    mean: tuple[int, ...]
    variance: tuple[int, ...]


NOTHING: Final = Profile((), ())


def blocks_held(*, prompt: int, generated: int, outputs: int, block_size: int, shared: bool) -> int:
    """Blocks of a request with ``generated`` tokens in each of its outputs; ``shared``: they share whole prompt blocks."""
    common = prompt // block_size if shared and outputs > 1 else 0
    own = prompt - common * block_size + generated
    return common + outputs * -(-own // block_size)


def expected(
    *, curve: Curve, prompt: int, generated: int, limit: int | None, outputs: int, block_size: int, shared: bool
) -> Profile:
    """Profile of a request whose outputs have ``generated`` tokens each and end after ``curve``, at ``limit`` at the latest.

    An output that reaches its limit between two moments is taken to live until the later one, at its final size.
    """
    common = prompt // block_size if shared and outputs > 1 else 0
    first = prompt - common * block_size + generated
    waste = 0.5 - 0.5 / block_size  # of the last block, on average
    alive_now = curve.exceeds(generated)
    left = math.inf if limit is None else limit - generated
    mean: list[int] = []
    variance: list[int] = []
    before = -1
    for moment, middle in zip(MOMENTS, _MIDDLES, strict=True):
        if before >= left:
            break
        share = curve.exceeds(generated + middle) / alive_now
        if share < _LEAST_SHARE:
            break
        size = (first + min(moment, left)) / block_size + waste
        held = outputs * share * size
        spread = held * (1.0 - share) * size
        if common:
            some = 1.0 - (1.0 - share) ** outputs  # while one output lives, so does the prompt that they share
            held += common * some
            spread += common * common * some * (1.0 - some)
        mean.append(round(ONE * held))
        variance.append(round(ONE * spread))
        before = moment
    return Profile(tuple(mean), tuple(variance))


def worst(*, prompt: int, limit: int, outputs: int, lookahead: int, block_size: int) -> Profile:
    """Profile of a request that holds, from now on, all that it may ever hold; nothing shared."""
    return Profile((ONE * outputs * -(-(prompt + limit + lookahead) // block_size),), (0,))


class Peak:
    """The sum of the profiles in it. Adding, removing and asking cost the length of the ladder, not of the set."""

    def __init__(self) -> None:
        self._mean = [0] * len(MOMENTS)
        self._variance = [0] * len(MOMENTS)

    def add(self, profile: Profile) -> None:
        """Puts a profile in."""
        for at, (mean, variance) in enumerate(zip(profile.mean, profile.variance, strict=True)):
            self._mean[at] += mean
            self._variance[at] += variance

    def remove(self, profile: Profile) -> None:
        """Takes out a profile that was put in."""
        for at, (mean, variance) in enumerate(zip(profile.mean, profile.variance, strict=True)):
            self._mean[at] -= mean
            self._variance[at] -= variance

    def blocks(self, candidate: Profile = NOTHING, *, z: float) -> float:
        """M in blocks, of what is in and one candidate more."""
        return max(self._needs(candidate, z=z)) / ONE

    def steps_until(self, candidate: Profile, *, limit: float, z: float) -> int | None:
        """First of ``MOMENTS`` from which on what is in now leaves room for ``candidate`` under ``limit`` blocks.

        None if it never does. Nobody else is let in meanwhile; the candidate's own peak is held beside the rest.
        """
        own = max(candidate.mean, default=0)
        free_from: int | None = None
        for moment, need in zip(MOMENTS, self._needs(NOTHING, z=z), strict=True):
            if need + own > limit * ONE:
                free_from = None
            elif free_from is None:
                free_from = moment
            if not need:
                break
        return free_from

    def _needs(self, candidate: Profile, *, z: float) -> list[float]:
        scale = z * math.sqrt(ONE)
        needs = [mean + scale * math.sqrt(var) for mean, var in zip(self._mean, self._variance, strict=True)]
        for at, (mean, variance) in enumerate(zip(candidate.mean, candidate.variance, strict=True)):
            needs[at] = self._mean[at] + mean + scale * math.sqrt(self._variance[at] + variance)
        return needs
