"""Two groups: a crash loop of one is no business of the other, and neither is a node that both lose a rank with."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from e2e.rings.callers import Caller
from e2e.rings.conftest import RESTART_BUDGET, SERVICE, Mistakes, Service
from e2e.rings.drill import Work
from e2e.rings.ring import Ring, restarts
from e2e.rings.service import SIZE
from e2e.rings.streams import ask
from e2e.rings.times import tell
from e2e.rings.watching import PodWatch, most_short_at_once
from e2e.stack import SYSTEM_NAMESPACE, Stack
from e2e.tests.client import address
from e2e.tests.fleet import reachable
from e2e.tests.sidecar import eventually
from kvplane_api import names

WORK = Work(output_tokens=200)
NEXT_TOKEN_SECONDS = 3.0

pytestmark = pytest.mark.timeout(900)


def test_a_crash_loop_ends_in_a_verdict_and_touches_nobody_else(service: Service, mistakes: Mistakes) -> None:
    """Rank 0 of group 0 ends whenever it is started, so that group forms no ring; group 1 is well."""
    began = time.monotonic()
    service.apply(groups=2, crashing=True)
    crashing, other = service.ring(0), service.ring(1)
    seconds = _moments(
        began,
        formed=other.is_whole,
        judged=lambda: bool(service.pool().get("failedGroups") == [0]),
        freed=lambda: bool(service.pool().get("failedGroups")) and not crashing.pods(),
    )
    tell(f"a group of {SIZE} is whole {seconds['formed']:.1f} s after kubectl apply, which made two of them")
    tell(
        f"crash loop: the verdict {seconds['judged']:.1f} s, its pods gone {seconds['freed']:.1f} s after kubectl apply"
    )
    before = [(pod["metadata"]["uid"], restarts(pod)) for pod in other.pods()]
    assert [count for _, count in before] == [0] * SIZE

    def degraded() -> dict[str, Any]:
        return service.stack.conditions(service.namespace, SERVICE).get("Degraded", {})

    _eventually(lambda: degraded().get("reason") == "RestartBudgetExhausted", degraded)
    assert degraded()["status"] == "True"
    message = degraded()["message"]
    assert f"more than ring.recovery.restartBudget ({RESTART_BUDGET})" in message
    assert "KVPLANE_RING_MAX_SEQUENCES is 00" in message, "the last log lines of the first crash"
    (entry,) = [entry for entry in service.pool()["restarts"] if entry["group"] == 0]
    assert entry["count"] > RESTART_BUDGET
    prompt = WORK.prompt(seed=100)
    reachable(service.stack, service.namespace, SERVICE)
    answer = ask(address(service.stack, service.namespace, SERVICE), SERVICE, prompt, count=WORK.output_tokens)
    assert answer.error is None
    assert mistakes(prompt, answer.tokens) == []

    retried = time.monotonic()
    service.heal()
    crashing.await_whole()
    tell(f"crash loop: whole {time.monotonic() - retried:.1f} s after its cause was taken away and a retry asked for")
    assert "failedGroups" not in service.pool()
    assert [(pod["metadata"]["uid"], restarts(pod)) for pod in other.pods()] == before


def test_a_node_with_ranks_of_two_groups_is_drained_one_rank_after_the_other(
    service: Service, stack: Stack, mistakes: Mistakes
) -> None:
    service.apply(groups=2, crashing=False)
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
            stack.kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=300s")
            drained = time.monotonic()
            for ring in rings:
                ring.await_whole()
        finally:
            stack.kubectl("uncordon", node)
        whole = time.monotonic()
    tell(f"drain of a node with ranks of two groups: over after {drained - began:.1f} s, whole {whole - began:.1f} s")
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


def _moments(began: float, **holds: Callable[[], bool]) -> dict[str, float]:
    """Seconds from ``began`` until each of these held for the first time."""
    seconds: dict[str, float] = {}

    def all_have_held() -> bool:
        for name in holds.keys() - seconds.keys():
            if holds[name]():
                seconds[name] = time.monotonic() - began
        return len(seconds) == len(holds)

    _eventually(all_have_held, lambda: f"held: {seconds}, wanted: {sorted(holds)}")
    return seconds


def _eventually(holds: Callable[[], bool], otherwise: Callable[[], object]) -> None:
    eventually(holds, seconds=240, otherwise=otherwise)
