"""Which groups get a new template now, and which pods go for it.

Ranks of two templates never form one ring, so a group changes as a whole: drained, its StatefulSet given the new template,
its pods deleted together, formed. A set whose turn has not come keeps its old template, so that a rank which fails
meanwhile comes back as it was. A ring that serves is touched only while no other is short of a rank. One that has served
nobody for a while costs nothing, and goes at once: a mistake that keeps every ring from forming is corrected everywhere.
A template that a group was given up with takes no ring that serves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from kvplane_operator.plan.ring.drain import drained, remaining_seconds
from kvplane_operator.plan.ring.groups import Group, Rank


@dataclass(frozen=True)
class Renewal:
    """What a rollout does now."""

    drain: tuple[Group, ...] = ()
    """Their rank 0 is to take no more requests."""
    take: frozenset[int] = field(default_factory=frozenset)
    """Groups whose StatefulSet gets the wanted template now."""
    delete: tuple[Rank, ...] = ()
    """Pods that go, all of a group at the same time."""
    pending: int = 0
    """Groups that are not yet as wanted."""
    waits_for: tuple[int, ...] = ()
    """Groups that keep the rest from going on, as they are short of a rank or were given up; empty while something goes on."""
    wake_after_seconds: float | None = None


def renewal(
    groups: Sequence[Group],
    *,
    given_up: Sequence[Group] = (),
    template: str,
    now: datetime,
    grace_seconds: float,
    drain_seconds: int,
) -> Renewal:
    """The next things to do so that all ranks of ``groups`` are of ``template``; nothing where they are.

    ``groups`` are those that stay and were not ``given_up``. How many ranks a ring has is part of its template. A drained group
    that is as wanted (its scale-down was taken back) is renewed too: a sidecar that drains does not serve again by itself.
    """
    pending = [group for group in groups if _stale(group, template) or _old(group) or group.draining]
    under_way = [group for group in pending if group.draining or not _stale(group, template)]
    turn = [group for group in pending if group in under_way or group.idle(now, grace_seconds)]
    blocking: tuple[int, ...] = ()
    spoiled = tuple(group.number for group in given_up if not _stale(group, template))
    if spoiled:
        blocking = spoiled
    elif not under_way:
        chosen, blocking = _next(pending, groups)
        turn += chosen
    drain: list[Group] = []
    take: set[int] = set()
    delete: list[Rank] = []
    waits = [seconds for group in pending if (seconds := group.seconds_to_idle(now, grace_seconds))]
    for group in turn:
        if group.formed and not group.draining:
            drain.append(group)
        elif group.draining and not drained(group, now=now, drain_seconds=drain_seconds):
            drain.append(group)
            waits.append(remaining_seconds(group, now=now, drain_seconds=drain_seconds))
        elif _stale(group, template):
            take.add(group.number)
        elif group.observed:
            delete += _old(group) or [rank for rank in group.ranks if not rank.going]
    return Renewal(
        drain=tuple(drain),
        take=frozenset(take),
        delete=tuple(delete),
        pending=len(pending),
        waits_for=blocking if not turn else (),
        wake_after_seconds=min(waits, default=None),
    )


def _next(pending: Sequence[Group], groups: Sequence[Group]) -> tuple[list[Group], tuple[int, ...]]:
    """The one ring that serves and may go now, and the groups that keep others from it.

    A whole ring goes only beside whole ones. One that is short of a rank already may go beside rings that all serve: that
    leaves as many short ones as there were, and is how a template that loses ranks is replaced.
    """
    serving = sorted((g for g in pending if g.formed), key=lambda g: (g.whole, g.in_flight, g.number))
    for group in serving:
        others = [other for other in groups if other is not group]
        if all(other.whole for other in others) or (not group.whole and all(other.formed for other in others)):
            return [group], ()
    return [], tuple(group.number for group in groups if not group.whole)


def _stale(group: Group, template: str) -> bool:
    return group.template != template


def _old(group: Group) -> list[Rank]:
    """Ranks that were made before their set got its template."""
    return [rank for rank in group.ranks if not rank.going and rank.template != group.template]
