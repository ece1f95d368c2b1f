"""Which groups there are to be: numbers are identities, and the emptiest goes first."""

from hypothesis import given
from hypothesis import strategies as st

from kvplane_operator.plan.ring.groups import Group
from kvplane_operator.plan.ring.scale import Scale, scale
from tests.kvplane_operator.ring_groups import group


def scaled(
    *groups: Group, replicas: int, failed: frozenset[int] = frozenset(), taken: frozenset[int] | None = None
) -> Scale:
    names = frozenset(g.number for g in groups) if taken is None else taken
    return scale(groups, replicas=replicas, failed=failed, taken=names)


def test_a_new_service_begins_at_0() -> None:
    assert scaled(replicas=3) == Scale(staying=(), made=(0, 1, 2), leaving=())


def test_holes_are_filled_first() -> None:
    assert scaled(group(1), group(3), replicas=4).made == (0, 2)


def test_a_number_whose_pods_linger_waits() -> None:
    assert scaled(group(1), replicas=2, taken=frozenset({0, 1})).made == (2,)


def test_the_emptiest_goes() -> None:
    found = scaled(group(0, in_flight=5), group(1, in_flight=1), group(2, in_flight=3), replicas=2)
    assert (found.staying, found.leaving) == ((0, 2), (1,))


def test_among_equals_the_highest_number_goes() -> None:
    assert scaled(group(0), group(1), group(2), replicas=1).leaving == (1, 2)


def test_what_nobody_knows_may_be_full() -> None:
    assert scaled(group(0, in_flight=7), group(1, in_flight=None), replicas=1).leaving == (0,)


def test_what_serves_nobody_goes_before_what_is_empty() -> None:
    assert scaled(group(0, down_seconds=100), group(1, in_flight=0), replicas=1).leaving == (0,)


def test_what_was_given_up_goes_before_what_may_still_form() -> None:
    given_up = Group(1, size=0)
    assert scaled(group(0, down_seconds=100), given_up, replicas=1, failed=frozenset({1})).leaving == (1,)


def test_a_choice_once_made_stands() -> None:
    """A drained sidecar serves no more, so another victim would make two groups short."""
    drained = group(0, drain_seconds=3, in_flight=9)
    assert scaled(drained, group(1, in_flight=0), replicas=1).leaving == (0,)


def test_a_group_that_was_given_up_is_not_replaced() -> None:
    assert scaled(group(0), Group(1, size=0), replicas=2, failed=frozenset({1})).made == ()


numbers = st.sets(st.integers(0, 12), max_size=8)
counts = st.one_of(st.none(), st.integers(0, 5))


@given(numbers, st.lists(counts, min_size=13, max_size=13), st.integers(0, 10), st.sets(st.integers(0, 12), max_size=3))
def test_there_are_as_many_as_asked_for(
    existing: set[int], held: list[int | None], replicas: int, lingering: set[int]
) -> None:
    groups = [group(number, in_flight=held[number]) for number in sorted(existing)]
    found = scale(groups, replicas=replicas, failed=(), taken=existing | lingering)
    assert len(found.staying) + len(found.made) == replicas
    assert set(found.staying) | set(found.leaving) == existing
    assert not set(found.made) & (existing | lingering)
    assert not (found.made and found.leaving)
    if found.leaving and found.staying:
        known = {g.number: g.in_flight for g in groups}
        assert max(known[n] for n in found.leaving) <= min(known[n] for n in found.staying)
