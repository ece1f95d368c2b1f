"""A rollout goes group by group: no second ring is made short of a rank, and it comes to its end."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane_operator.plan.ring.groups import Group, Rank
from kvplane_operator.plan.ring.rollout import Renewal, renewal
from tests.kvplane_operator.ring_groups import NEW, OLD, ago, group, rank
from tests.kvplane_operator.world import NOW

GRACE, DRAIN = 30.0, 600


def renewed(*groups: Group) -> Renewal:
    return renewal(groups, template=NEW, now=NOW, grace_seconds=GRACE, drain_seconds=DRAIN)


def drained_groups(found: Renewal) -> list[int]:
    return [g.number for g in found.drain]


def test_nothing_is_done_where_all_is_as_wanted() -> None:
    assert renewed(group(0), group(1)) == Renewal()


def test_one_group_is_drained_at_a_time_the_emptiest_first() -> None:
    found = renewed(group(0, template=OLD, in_flight=3), group(1, template=OLD, in_flight=1))
    assert (drained_groups(found), found.take, found.delete, found.pending) == ([1], frozenset(), (), 2)


def test_the_set_changes_only_once_the_group_is_drained() -> None:
    waiting = renewed(group(0, template=OLD, drain_seconds=20, in_flight=1), group(1, template=OLD))
    assert (drained_groups(waiting), waiting.take) == ([0], frozenset())
    assert waiting.wake_after_seconds == 5 + DRAIN - 20
    done = renewed(group(0, template=OLD, drain_seconds=20, in_flight=0), group(1, template=OLD))
    assert (drained_groups(done), done.take, done.delete) == ([], frozenset({0}), ())


def test_for_some_seconds_a_drained_rank_0_still_serves() -> None:
    early = renewed(group(0, template=OLD, drain_seconds=2, in_flight=0), group(1))
    assert (early.take, early.wake_after_seconds) == (frozenset(), 3)


def test_a_drain_has_an_end() -> None:
    assert renewed(group(0, template=OLD, drain_seconds=5 + DRAIN, in_flight=1), group(1)).take == {0}


def test_all_pods_of_the_group_go_together() -> None:
    found = renewed(group(0, pods=OLD, drain_seconds=20), group(1, template=OLD))
    assert [r.pod for r in found.delete] == ["chat-ring-0-0", "chat-ring-0-1", "chat-ring-0-2"]


def test_pods_go_only_once_their_controller_knows_the_new_template() -> None:
    """Else it would make them of the old one, and they would go again."""
    found = renewed(replace(group(0, pods=OLD, drain_seconds=20), observed=False), group(1, template=OLD))
    assert (found.drain, found.take, found.delete) == ((), frozenset(), ())


def test_the_next_waits_until_the_ring_is_whole() -> None:
    forming = group(0, down_seconds=5)
    found = renewed(forming, group(1, template=OLD))
    assert (found.drain, found.take, found.delete) == ((), frozenset(), ())
    assert (found.pending, found.waits_for) == (1, (0,))
    at_n_minus_1 = group(0, missing=1)
    assert renewed(at_n_minus_1, group(1, template=OLD)).waits_for == (0,)


def test_a_template_that_a_group_was_given_up_with_takes_no_other_ring() -> None:
    def beside(given_up: Group, *others: Group) -> Renewal:
        return renewal(others, given_up=[given_up], template=NEW, now=NOW, grace_seconds=GRACE, drain_seconds=DRAIN)

    serves, idle = group(1, template=OLD), group(2, template=OLD, down_seconds=GRACE + 1)
    spoiled = beside(group(0, missing=3), serves, idle)
    assert (spoiled.drain, spoiled.take, spoiled.pending) == ((), frozenset({2}), 2)  # who serves nobody loses nothing
    assert beside(group(0, missing=3), serves).waits_for == (0,)
    assert drained_groups(beside(group(0, template=OLD, missing=3), serves)) == [1]


def test_a_short_ring_goes_before_whole_ones() -> None:
    found = renewed(group(0, template=OLD), group(1, template=OLD, missing=1, in_flight=9))
    assert drained_groups(found) == [1]


def test_a_short_ring_does_not_go_while_another_serves_nobody() -> None:
    found = renewed(group(0, down_seconds=5), group(1, template=OLD, missing=1))
    assert (found.drain, found.waits_for) == ((), (0, 1))


def test_what_serves_nobody_is_renewed_at_once() -> None:
    """A mistake that keeps every ring from forming is corrected everywhere."""
    found = renewed(*(group(n, template=OLD, down_seconds=100) for n in range(3)))
    assert (found.drain, found.take) == ((), frozenset({0, 1, 2}))
    taken = renewed(*(group(n, pods=OLD, down_seconds=100) for n in range(3)))
    assert len(taken.delete) == 9


def test_a_ring_that_forms_anew_is_no_ring_that_serves_nobody() -> None:
    found = renewed(group(0, template=OLD, down_seconds=10))
    assert (found.take, found.wake_after_seconds) == (frozenset(), GRACE - 10)


def test_a_scale_down_that_was_taken_back_renews_the_group() -> None:
    """A sidecar that drains does not serve again by itself."""
    found = renewed(group(0, drain_seconds=20), group(1))
    assert [r.ordinal for r in found.delete] == [0, 1, 2]


def test_a_ring_that_formed_after_its_set_changed_is_drained_too() -> None:
    assert drained_groups(renewed(group(0, pods=OLD), group(1))) == [0]


def test_pods_on_their_way_are_left_alone() -> None:
    going = replace(group(0, drain_seconds=20, pods=OLD))
    ranks = tuple(replace(r, going=True, ready=False) for r in going.ranks[1:])
    found = renewed(replace(going, ranks=(going.ranks[0], *ranks)), group(1))
    assert [r.ordinal for r in found.delete] == [0]


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_a_rollout_of_rings_that_work_never_has_two_short_ones(groups: int) -> None:
    fleet = Fleet([group(n, template=OLD) for n in range(groups)])
    for _ in range(100):
        fleet.step()
        assert fleet.short() <= 1
    assert fleet.done()


class Fleet:
    """Groups that do what they are told: a drain empties, deleted pods come back, rings form a step later."""

    def __init__(self, groups: list[Group]) -> None:
        self.groups = groups

    def short(self) -> int:
        return sum(not g.whole for g in self.groups)

    def done(self) -> bool:
        return all(g.whole and g.template == NEW and all(r.template == NEW for r in g.ranks) for g in self.groups)

    def step(self) -> Renewal:
        found = renewed(*self.groups)
        deleted = {r.uid for r in found.delete}
        drains = {g.number for g in found.drain}
        self.groups = [self._after(g, found.take, drains, deleted) for g in self.groups]
        return found

    def _after(self, before: Group, take: frozenset[int], drains: set[int], deleted: set[str]) -> Group:
        now = replace(before, template=NEW) if before.number in take else before
        if any(r.uid in deleted for r in before.ranks):
            assert {r.uid for r in before.ranks} == deleted & {r.uid for r in before.ranks}, "pods go together"
            fresh = [rank(now.number, o, template=now.template, ready=False, since=NOW) for o in range(now.size)]
            return replace(now, ranks=tuple(fresh))
        return replace(now, ranks=tuple(self._rank(r, now, drains) for r in now.ranks))

    def _rank(self, before: Rank, of: Group, drains: set[int]) -> Rank:
        if of.number in drains and before.ordinal == 0:
            empty = before.draining and (before.in_flight or 0) == 0
            return replace(
                before,
                ready=False,
                draining=True,
                drain_since=ago(60) if empty or before.draining else before.drain_since or ago(1),
                in_flight=max(0, (before.in_flight or 0) - 1),
            )
        if of.draining or before.template != of.template:
            return before
        return replace(before, ready=True)


fleets = st.lists(
    st.tuples(st.sampled_from([OLD, NEW]), st.integers(0, 3), st.sampled_from(["whole", "short", "idle"])),
    min_size=1,
    max_size=5,
)


@given(fleets)
def test_every_rollout_ends_and_shortens_no_second_ring(start: list[tuple[str, int, str]]) -> None:
    fleet = Fleet(
        [
            group(
                n,
                template=template,
                in_flight=held,
                missing=1 if kind == "short" and template == OLD else 0,
                down_seconds=100 if kind == "idle" else None,
            )
            for n, (template, held, kind) in enumerate(start)
        ]
    )
    for _ in range(100):
        before = fleet.short()
        fleet.step()
        assert fleet.short() <= max(1, before)
    assert fleet.done()
