"""Two groups: the one that was given up has another try, and a node that both lose a rank with is drained."""

import time
from contextlib import ExitStack

import pytest

from e2e.rings.callers import Caller
from e2e.rings.conftest import SERVICE, Mistakes, Service
from e2e.rings.drill import Work
from e2e.rings.ring import Ring, restarts
from e2e.rings.service import SIZE
from e2e.rings.watching import PodWatch, most_short_at_once
from e2e.stack import SYSTEM_NAMESPACE, Stack
from e2e.tests.sidecar import eventually
from e2e.times import tell
from kvplane_api import names

WORK = Work(output_tokens=200)
NEXT_TOKEN_SECONDS = 3.0

pytestmark = pytest.mark.timeout(600)


def test_a_retry_starts_the_group_that_was_given_up(service: Service, ring: Ring) -> None:
    eventually(lambda: service.pool().get("failedGroups") == [0], seconds=240, otherwise=service.pool)
    before = [(pod["metadata"]["uid"], restarts(pod)) for pod in ring.pods()]
    retried = time.monotonic()
    service.heal()
    service.ring(0).await_whole()
    tell(f"crash loop: whole {time.monotonic() - retried:.1f} s after its cause was taken away and a retry asked for")
    service.stack.wait_ready(service.namespace, SERVICE, seconds=30)
    pool = service.pool()
    assert "failedGroups" not in pool
    assert [pool.get(name) for name in ("replicas", "ready")] == [2, 2]
    assert [(pod["metadata"]["uid"], restarts(pod)) for pod in ring.pods()] == before


def test_a_node_with_ranks_of_two_groups_is_drained_one_rank_after_the_other(
    service: Service, stack: Stack, mistakes: Mistakes
) -> None:
    service.heal()
    rings = [service.ring(group) for group in (0, 1)]
    for ring in rings:
        ring.await_whole()
    node = _shared_node(rings, stack)
    with PodWatch(stack, service.namespace, f"{names.LABEL_SERVICE}={SERVICE}") as watch, ExitStack() as callers:
        calling = [callers.enter_context(Caller(ring, WORK, seed=1000 * (ring.group + 1))) for ring in rings]
        for caller in calling:
            caller.await_tokens()
        began = time.monotonic()
        try:
            # It takes the second rank once the first one is back on another node.
            stack.kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=300s")
        finally:
            stack.kubectl("uncordon", node)
        tell(f"drain of a node with ranks of two groups: over after {time.monotonic() - began:.1f} s")
    assert most_short_at_once(watch, size=SIZE) == 1, "while one group is short of a rank, no other loses one"
    for caller in calling:
        pause = caller.longest_pause()
        tell(
            f"… group {caller.ring.group}: {len(caller.whole())} answers, {len(caller.cut())} cut, longest pause {pause:.2f} s"
        )
        assert caller.cut() == []
        assert [found for prompt, answer in caller.whole() if (found := mistakes(prompt, answer.tokens))] == []
        if caller.leader_stayed():
            assert pause <= NEXT_TOKEN_SECONDS


def _shared_node(rings: list[Ring], stack: Stack) -> str:
    """A node with a rank of each: three ranks of each are on four nodes, so there are two at least.

    Best one without the operator, which is one pod here, and without a rank 0, whose streams would have to end first.
    """
    found = stack.get(SYSTEM_NAMESPACE, "pods", "-l", "app.kubernetes.io/component=operator")
    operators = {pod["spec"].get("nodeName") for pod in found}
    placed = [[ring.node(rank) for rank in range(SIZE)] for ring in rings]
    shared = set.intersection(*map(set, placed))
    return min(shared, key=lambda node: (node in operators, sum(nodes[0] == node for nodes in placed), node))
