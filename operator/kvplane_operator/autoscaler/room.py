"""How much room prompts need beside their work, so that promises are kept: learned from what became of answers.

Prompts come at random, and each of them holds up the tokens of all that run beside it. So promises are broken long before a
replica computes prompts all the time. How many replicas it takes grows slower than the work, as many share one another's
luck (square-root staffing: Halfin and Whitt 1981):

    N = R + z x sqrt(R)

R is the work in replicas: prompt tokens computed per second over the most that one replica was seen to compute. z is the
*margin*. Answers are counted, as kept or broken, by the margin at which they were given, in bins of equal ratio. More room
breaks no more promises, so the share p of broken ones is fitted as one that only falls with the margin (isotonic regression:
Ayer et al. 1955, by pooling neighbours). Of the margins that were seen the one counts with the least cost

    N x (1 + c x p(z))

in which a replica's share of broken promises costs ``cost_of_miss`` replicas, c: where promises are kept by few replicas more,
as with many small requests, nearly all are; where it would take many, as for bursts of long prompts, fewer are.

Promises that are broken with any room, as those that no replica could keep, say nothing about room: p is what is
beyond the share of the widest margin seen. While all margins seen break too many, a wider one is tried; where twice as wide a
margin breaks as many as before, none is asked for.

An answer belongs to the highest work from WINDOW_SECONDS before it was seen to be over until SHOWN_SECONDS after that: how heavy
a burst is shows only when its first answers are over.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

RATIO: Final = 1.15
"""Of the two ends of a bin."""
LEAST_MARGIN: Final = 0.1
MOST_MARGIN: Final = 100.0
"""Margins are counted as within these two; the most is also that of no work."""
BINS: Final = 50
"""That there are between them."""
WINDOW_SECONDS: Final = 20.0
SHOWN_SECONDS: Final = 20.0
_WORKS: Final = 64
_MOST_ANSWERS: Final = 2000.0
"""That a bin remembers: of more, each counts for less."""
_FORGOTTEN_SECONDS: Final = 12 * 3600.0
"""In which answers, and the fastest replica, are forgotten e-fold: another model may be served by then."""
_LEAST_ANSWERS: Final = 30.0
_LEAST_BROKEN: Final = 3.0
"""Fewer answers, or fewer broken ones, tell nothing."""
_MANY: Final = 0.05
"""Share of broken promises from which on room is short."""
_TRIED_RATIO: Final = 2.0
"""Of the widest margin to the narrowest: where both break as many promises, more room does not help."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Counts, of which each may be less than one by now."""

    kept: float = 0.0
    broken: float = 0.0

    @property
    def count(self) -> float:
        return self.kept + self.broken

    @property
    def share(self) -> float:
        """Of broken ones."""
        return self.broken / self.count if self.count else 0.0

    def plus(self, more: "Answers") -> "Answers":
        return Answers(self.kept + more.kept, self.broken + more.broken)

    def times(self, share: float) -> "Answers":
        return Answers(self.kept * share, self.broken * share)


@dataclass(frozen=True, slots=True)
class Needed:
    """Replicas that prompts need, and the margin that is in them."""

    replicas: float
    margin: float


@dataclass(frozen=True, slots=True)
class Over:
    """Answers that were over at one time, given by so many replicas, and whose work is not all seen yet."""

    at: float
    replicas: int
    answers: Answers


@dataclass(frozen=True, slots=True)
class _Block:
    """Neighbouring bins, taken together."""

    narrowest: int
    widest: int
    answers: Answers

    @property
    def margin(self) -> float:
        """In the middle."""
        return math.pow(RATIO, (self.narrowest + self.widest + 1) / 2)

    @property
    def breaks_many(self) -> bool:
        """Enough of enough to tell."""
        answers = self.answers
        return answers.share > _MANY and answers.broken >= _LEAST_BROKEN and answers.count >= _LEAST_ANSWERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What was learned, and what that is learned from."""

    bins: Mapping[int, Answers] = field(default_factory=dict)
    """By the logarithm of the margin, to the base RATIO, rounded down."""
    fastest: float | None = None
    """Prompt tokens per second, the most that one replica computed over some seconds; ``None``: none was seen."""
    choices: tuple[tuple[float, float], ...] = ()
    """(margin, share of promises that it breaks); none while nothing says that room is short."""
    works: tuple[tuple[float, float], ...] = ()
    """(time, prompt tokens per second of all replicas) of late."""
    over: tuple[Over, ...] = ()

    def needed(self, pace: float, backlog: float, *, cost_of_miss: float) -> Needed | None:
        """For prompts that are computed at ``pace`` and pile up, or are refused, at ``backlog`` tokens per second.

        ``None`` while nothing says that room is short.
        """
        if not self.choices or not self.fastest:
            return None
        since = self.works[-1][0] - WINDOW_SECONDS if self.works else 0.0
        highest = max([pace, *(work for at, work in self.works if at > since)])
        root = math.sqrt((highest + backlog) / self.fastest)
        margin, _ = min(self.choices, key=lambda each: (root + each[0]) * (1 + cost_of_miss * each[1]))
        return Needed(root * (root + margin), margin)

    def resumed(self) -> "Room":
        """Without what was of the last seconds before a pause."""
        return replace(self, works=(), over=())

    def noted(self, paces: Iterable[float], answers: Answers, *, seconds: float, now: float) -> "Room":
        """After ``seconds`` more that ended with these paces, one of each replica, and with these answers over."""
        known = list(paces)
        if not known:
            return self
        forgotten = math.exp(-seconds / _FORGOTTEN_SECONDS)
        fastest = max(*known, (self.fastest or 0.0) * forgotten)
        if not fastest:
            return self
        oldest = now - WINDOW_SECONDS - SHOWN_SECONDS
        works = (*(work for work in self.works if oldest < work[0] < now), (now, sum(known)))[-_WORKS:]
        over = tuple(each for each in self.over if each.at <= now)
        if answers.count:
            over = (*over, Over(now, len(known), answers))[-_WORKS:]
        bins = {index: each.times(forgotten) for index, each in self.bins.items()}
        for each in over:
            if each.at <= now - SHOWN_SECONDS:
                highest = max((work for at, work in works if at > each.at - WINDOW_SECONDS), default=0.0)
                _count(bins, _margin(each.replicas, highest / fastest), each.answers)
        return replace(
            self,
            bins=bins,
            fastest=fastest,
            choices=choices(bins),
            works=works,
            over=tuple(each for each in over if each.at > now - SHOWN_SECONDS),
        )


def index_of(margin: float) -> int:
    """The bin of a margin."""
    return math.floor(math.log(margin) / math.log(RATIO))


def restored(bins: Mapping[int, Answers], *, fastest: float | None) -> Room:
    """With what survives a restart."""
    return Room(bins=bins, fastest=fastest, choices=choices(bins))


def choices(bins: Mapping[int, Answers]) -> tuple[tuple[float, float], ...]:
    """The margins that there are to choose from, each with the share of promises that it breaks beyond what none can keep.

    None while no margin seen breaks many, or where room does not help.
    """
    blocks = _pooled(bins)
    if not any(block.breaks_many for block in blocks):
        return ()
    if len(blocks) > 1:
        unavoidable = blocks[0].answers.share
        return tuple((block.margin, block.answers.share - unavoidable) for block in blocks)
    only = blocks[0]
    if RATIO ** (only.widest - only.narrowest) >= _TRIED_RATIO:
        return ()
    return ((RATIO ** (only.widest + 2), 0.0),)


def _pooled(bins: Mapping[int, Answers]) -> list[_Block]:
    """The widest margins first, each block with a higher share of broken promises than the one before."""
    blocks: list[_Block] = []
    for index in sorted(bins, reverse=True):
        blocks.append(_Block(index, index, bins[index]))
        while len(blocks) > 1 and (
            blocks[-2].answers.share >= blocks[-1].answers.share or blocks[-2].answers.count < _LEAST_ANSWERS
        ):
            narrow, wide = blocks.pop(), blocks.pop()
            blocks.append(_Block(narrow.narrowest, wide.widest, wide.answers.plus(narrow.answers)))
    return blocks


def _margin(replicas: int, work: float) -> float:
    return (replicas - work) / math.sqrt(work) if work > 0 else MOST_MARGIN


def _count(bins: dict[int, Answers], margin: float, answers: Answers) -> None:
    index = index_of(min(max(margin, LEAST_MARGIN), MOST_MARGIN))
    found = bins.get(index, Answers()).plus(answers)
    bins[index] = found.times(min(1.0, _MOST_ANSWERS / found.count))
