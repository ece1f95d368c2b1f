"""What else a run may meet than the comparison's usual start-up times, scrapes and prompts. Pure.

The comparison holds these still, so a result might be theirs. A few cells with one of them changed at a time show how much
hangs on each: ours and the best peers, behind our admission.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

_BLIND_EVERY_SECONDS: Final = 600.0
_BLIND_SECONDS: Final = 120.0
"""Longer than any figures count, shorter than a Prometheus forgets them."""
_BLIND_TIMES: Final = 30
"""Until the end of the longest variant."""


@dataclass(frozen=True)
class Condition:
    """What is not as usual."""

    scrape_seconds: float = 5.0
    """Between two scrapes: figures are so old at most."""
    silent: tuple[tuple[float, float], ...] = ()
    """Times in which no scrape succeeds."""
    cached_share: float = 0.0
    """Of each prompt, what the prefix cache has."""


USUAL: Final = "usual"
CONDITIONS: Final[dict[str, Condition]] = {
    USUAL: Condition(),
    "scraped every 0.5 s": Condition(scrape_seconds=0.5),
    "scraped every 15 s": Condition(scrape_seconds=15.0),
    "blind for 2 of 10 minutes": Condition(
        silent=tuple(
            (end - _BLIND_SECONDS, end)
            for end in (_BLIND_EVERY_SECONDS * (number + 1) for number in range(_BLIND_TIMES))
        )
    ),
    "half of each prompt cached": Condition(cached_share=0.5),
}
"""By name; half a second is the simulation's step, so no scrape is newer."""


def changes(startups: Sequence[float], others: Sequence[float]) -> Iterator[tuple[float, str]]:
    """(start-up time, condition) with one thing changed at a time, first those of ``startups`` as usual."""
    yield from ((startup, USUAL) for startup in sorted({*startups, *others}))
    yield from ((startups[0], name) for name in CONDITIONS if name != USUAL)
