"""What the watches show of ring groups, as values."""

import copy
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from kvplane_api import names
from kvplane_operator.plan.ring.groups import (
    Group,
    number_of,
    ordinal_of,
    serves_clients,
    set_name,
    set_number,
    tells,
    time_of,
)
from kvplane_operator.plan.snapshot import Reading
from tests.kvplane_operator.ring_groups import group
from tests.kvplane_operator.ring_world import RING, formed
from tests.kvplane_operator.world import NOW, pod, state


def test_a_ring_that_works() -> None:
    world = formed({**RING, "replicas": 2})
    first, second = world.groups()
    assert (first.number, second.number, first.size) == (0, 1, 3)
    assert [r.ordinal for r in first.ranks] == [0, 1, 2]
    assert (first.formed, first.whole, first.members, first.draining) == (True, True, 3, False)
    assert first.leader is not None
    assert first.leader.in_flight == 0
    assert {r.template for r in first.ranks} == {first.template}


def test_a_rank_on_its_way_out_is_no_member() -> None:
    world = formed()
    world.rank(0, 2)["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
    assert (world.group(0).members, world.group(0).formed, world.group(0).whole) == (2, True, False)
    world.rank(0, 0)["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
    assert (world.group(0).leader, world.group(0).formed) == (None, False)


def test_what_another_pod_says_is_not_believed() -> None:
    world = formed()
    world.readings["chat-ring-0-0"] = Reading(state("mail-0"))
    assert world.group(0).in_flight == float("inf")


@pytest.mark.parametrize(("seconds", "left"), [(None, None), (0, 30.0), (29, 1.0), (30, 0.0), (99, 0.0)])
def test_time_to_idle(seconds: float | None, left: float | None) -> None:
    assert group(0, down_seconds=seconds).seconds_to_idle(NOW, 30) == left


def test_a_group_without_pods_is_idle() -> None:
    assert group(0, size=0).idle(NOW, 30)


def test_a_group_whose_rank_0_is_cut_off_may_serve() -> None:
    found = group(0, down_seconds=100)
    leader, *others = found.ranks
    assert found.idle(NOW, 30)
    assert not Group(0, 3, found.template, (replace(leader, cut_off=True), *others)).idle(NOW, 30)
    assert Group(0, 3, found.template, (replace(leader, cut_off=True, going=True), *others)).idle(NOW, 30)


def test_the_last_change_counts() -> None:
    """A rank that comes or goes may be what makes the ring form."""
    found = group(0, down_seconds=100)
    newest = group(0, down_seconds=1).ranks[2]
    changed = Group(0, 3, found.template, (*found.ranks[:2], newest))
    assert not changed.idle(NOW, 30)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("chat-ring-0", 0),
        ("chat-ring-12", 12),
        ("chat", None),
        ("chat-pods", None),
        ("chat-ring-", None),
        ("chat-ring-a", None),
        ("other-ring-0", None),
    ],
)
def test_numbers_are_in_names(name: str, number: int | None) -> None:
    assert set_number(name, "chat") == number
    if number is not None:
        assert set_name("chat", number) == name


def test_clients_come_to_rank_0_and_to_paged_replicas() -> None:
    world = formed()
    assert [serves_clients(world.rank(0, n)) for n in range(3)] == [True, False, False]
    assert ordinal_of(pod("chat-5d4f-7")) is None
    assert serves_clients(pod("chat-5d4f-7"))


@pytest.mark.parametrize("name", ["loader-1", "chat-ring-1-2", "chat-ring-0", "mail-ring-0-1", "chat-ring-0-one"])
def test_a_label_alone_makes_no_rank(name: str) -> None:
    """Somebody else's pod with the labels of one, copied from a manifest say: a rollout must not delete it."""
    world = formed()
    foreign = copy.deepcopy(world.rank(0, 1))
    foreign["metadata"] |= {"name": name, "uid": "uid-of-another"}
    world.pods.append(foreign)
    assert (number_of(foreign), ordinal_of(foreign), serves_clients(foreign)) == (None, None, False)
    assert [rank.pod for rank in world.group(0).ranks] == ["chat-ring-0-0", "chat-ring-0-1", "chat-ring-0-2"]
    world.change(engine={"startupTimeoutSeconds": 60})
    deleted = {deletion.pod for _ in range(10) for deletion in world.step().pod_deletions}
    assert deleted == {"chat-ring-0-0", "chat-ring-0-1", "chat-ring-0-2"}


def test_a_drained_rank_0_is_still_asked() -> None:
    world = formed()
    leader = world.rank(0, 0)
    leader["status"]["conditions"][0]["status"] = "False"
    assert not tells(leader)
    leader["metadata"]["annotations"][names.ANNOTATION_DRAIN_SINCE] = "2026-01-01T12:00:00Z"
    assert tells(leader)
    leader["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
    assert not tells(leader)
    assert not tells(world.rank(0, 1))


def test_times_are_read_as_kubernetes_writes_them() -> None:
    assert time_of("2026-01-01T12:00:00Z") == datetime(2026, 1, 1, 12, tzinfo=UTC)
    assert time_of("2026-01-01T12:00:00") == datetime(2026, 1, 1, 12, tzinfo=UTC)
    assert [time_of(text) for text in (None, "", "soon")] == [None, None, None]
