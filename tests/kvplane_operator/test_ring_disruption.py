"""Node drains against the disruption budget, by the rule of the eviction API: two rings are never short at once."""

from typing import Any

import pytest

from kvplane_operator.plan.findings import ready
from kvplane_operator.plan.ring.groups import number_of, ordinal_of
from kvplane_operator.plan.snapshot import Kind
from tests.kvplane_operator.ring_world import RING, RingWorld, formed
from tests.kvplane_operator.world import PDB

DRAINED = "node-a"


def placed(*ranks: tuple[int, int], groups: int = 2) -> RingWorld:
    """Rings of three, with these ranks (group, ordinal) on the node that is drained."""
    world = formed({**RING, "replicas": groups})
    for where in ranks:
        world.rank(*where)["spec"]["nodeName"] = DRAINED
    return world


def evict(world: RingWorld, pod: dict[str, Any]) -> bool:
    """What the API server says to an eviction: KEP-3017 for pods that are not Ready, the budget for those that are."""
    budget = world.children[PDB]["spec"]
    asked = sum(child["spec"]["replicas"] for ref, child in world.children.items() if ref.kind is Kind.STATEFUL_SET)
    healthy, desired = sum(map(ready, world.pods)), asked - budget["maxUnavailable"]
    free_game = not ready(pod) and budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    allowed = free_game or (healthy > desired if ready(pod) else healthy >= desired)
    if allowed:
        world.pods.remove(pod)
    return allowed


def on_node(world: RingWorld) -> list[dict[str, Any]]:
    return [pod for pod in world.pods if pod["spec"]["nodeName"] == DRAINED]


def short(world: RingWorld) -> int:
    return sum(not group.whole for group in world.groups())


@pytest.mark.parametrize(
    "ranks",
    [((0, 1), (1, 1)), ((0, 0), (1, 0)), ((0, 1), (0, 2)), ((0, 0), (0, 1), (1, 0), (1, 2))],
    ids=["of two groups", "ranks 0 of two groups", "of one group", "of both"],
)
def test_a_drain_shortens_one_ring_at_a_time_and_ends(ranks: tuple[tuple[int, int], ...]) -> None:
    world = placed(*ranks)
    for _ in range(10):
        for pod in on_node(world):
            evict(world, pod)
            assert short(world) <= 1
            assert all(group.members >= 2 for group in world.groups())
        world.step()
    assert on_node(world) == []
    assert short(world) == 0


def test_a_ring_that_forms_anew_loses_no_second_rank() -> None:
    """For some seconds its ranks are not Ready, and hold the KV of what it was answering."""
    world = placed((0, 1), (0, 2))
    first, second = on_node(world)
    assert evict(world, first)
    for pod in world.pods:
        if number_of(pod) == 0:
            pod["status"]["conditions"][0]["status"] = "False"
    assert (number_of(second), ordinal_of(second)) == (0, 2)
    assert not evict(world, second)


def test_rings_that_never_form_hold_a_drain_up_only_as_long_as_one_may_load() -> None:
    """An image that cannot be pulled, say: nothing exits, so there is no verdict that would free the nodes."""
    world = RingWorld({**RING, "engine": {"startupTimeoutSeconds": 60}})
    world.down = {(0, ordinal) for ordinal in range(3)}
    world.run(6)
    assert not evict(world, world.rank(0, 1))
    world.step()
    assert evict(world, world.rank(0, 1))
    world.step()  # a rank that was made anew is no reason to wait again
    assert evict(world, world.rank(0, 2))
    world.down.clear()
    world.run(2)
    assert world.group(0).whole
    assert world.children[PDB]["spec"]["unhealthyPodEvictionPolicy"] == "IfHealthyBudget"


def test_a_rank_that_crashes_does_not_hold_a_drain_up() -> None:
    """Alone it is what the budget allows to be away, wherever it is."""
    world = placed((0, 1))
    world.crash(0, 1)
    assert evict(world, world.rank(0, 1))


def test_a_group_that_was_given_up_counts_for_nothing() -> None:
    world = placed((1, 1))
    world.crash(0, 0, times=6)
    world.run(10)
    assert world.ring_pool()["failedGroups"] == [0]
    assert evict(world, world.rank(1, 1))
