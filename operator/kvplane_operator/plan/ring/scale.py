"""Which groups there should be. Numbers are identities: a scale-down leaves holes, a scale-up fills the lowest ones.

A group that was given up counts as one: making another in its place would be a crash loop with more accelerators.
"""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kvplane_operator.plan.ring.groups import Group


@dataclass(frozen=True)
class Scale:
    """Numbers of groups."""

    staying: tuple[int, ...]
    """Those that are there, and stay."""
    made: tuple[int, ...]
    """Those that are to be made."""
    leaving: tuple[int, ...]
    """Those that are there, and are to be drained and deleted."""


def scale(groups: Sequence[Group], *, replicas: int, failed: Collection[int], taken: Collection[int]) -> Scale:
    """``replicas`` groups out of those that are there; ``taken`` numbers are not given to new ones.

    Victims in this order: what is drained already (so that a choice once made stands), what was given up, what serves
    nobody, then the emptiest; among equals the highest number.
    """

    def worth(group: Group) -> tuple[bool, bool, bool, float, int]:
        return (not group.draining, group.number not in failed, group.formed, group.in_flight, -group.number)

    by_worth = sorted(groups, key=worth)
    surplus = max(0, len(groups) - replicas)
    leaving = {group.number for group in by_worth[:surplus]}
    free = (number for number in itertools.count() if number not in taken)
    made = itertools.islice(free, max(0, replicas - len(groups)))
    return Scale(
        staying=tuple(group.number for group in groups if group.number not in leaving),
        made=tuple(made),
        leaving=tuple(sorted(leaving)),
    )
