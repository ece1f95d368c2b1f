"""Whatever ends a rank, its stream goes on with the right tokens; what it cost is told, and held against what is promised.

The bounds in seconds are promises of mode Ring, not measurements: `make bench-ring-recovery` measures. A node that is drained
is in test_two_groups.py.
"""

import time

import pytest

from e2e.cluster.api import Json
from e2e.cluster.cluster import Cluster
from e2e.rings.callers import Caller
from e2e.rings.conftest import REFORM_GRACE_SECONDS, Mistakes
from e2e.rings.drill import Lost, Work, lose_a_rank, lose_rank_0
from e2e.rings.ring import Ring, await_true, engine_log, engine_processes, restarts
from e2e.rings.service import SIZE
from e2e.stack import SYSTEM_NAMESPACE, Stack
from e2e.times import tell

WORK = Work()
VICTIM = 2
NEXT_TOKEN_SECONDS = 3.0
WHOLE_SECONDS = 60.0
AFTER_START_SECONDS = 2.0
ZOMBIE_SECONDS = 10.0
REJOIN_SECONDS = 30.0
"""Of a rank that was made again on another node, its load included."""
RECOMPUTED_TIMES_N = 1.3
STOPPED_SECONDS = 4.0
"""Longer than a ring takes to go on without the rank, shorter than its kubelet takes to kill it."""
NOTICED_SECONDS = 20.0
"""More, where rank 0 or its sidecar stood still too; with STOPPED_SECONDS still less than the kubelet takes."""
LOOK_SECONDS = 2.0
"""Rank 0's sidecar looks at its engine once a second."""

pytestmark = pytest.mark.timeout(600)


def _judge(what: str, lost: Lost, mistakes: Mistakes, *, whole_seconds: float = WHOLE_SECONDS) -> None:
    share = lost.recomputed_times_n(SIZE)
    tell(
        f"{what}: next token {lost.next_token_seconds:.2f} s (pause {lost.pause.seconds:.2f} s), back to {SIZE} ranks "
        f"{lost.whole_seconds:.1f} s, {lost.recomputed_tokens} of {lost.placed_tokens} tokens computed again ({share:.2f}/N)"
    )
    assert lost.answer.error is None
    assert mistakes(lost.prompt, lost.answer.tokens) == []
    assert share <= RECOMPUTED_TIMES_N
    assert lost.next_token_seconds <= NEXT_TOKEN_SECONDS
    assert lost.whole_seconds <= whole_seconds


def test_a_killed_process(ring: Ring, where: str, mistakes: Mistakes) -> None:
    before = ring.pods()
    lost = lose_a_rank(ring, where, work=WORK, seed=10, fault=lambda: ring.kill(VICTIM))
    _judge("kill -9 of a rank", lost, mistakes)
    after = ring.pods()
    assert _uids(after) == _uids(before), "the container is started again, and no pod is made anew"
    assert [restarts(pod) for pod in after] == [restarts(pod) + (at == VICTIM) for at, pod in enumerate(before)]


def test_a_process_that_stands_still_comes_back_as_it_was(ring: Ring, where: str, mistakes: Mistakes) -> None:
    before, epoch = ring.pods(), ring.epoch()

    def stop_for_a_while() -> None:
        ring.kill(VICTIM, "STOP")
        try:
            time.sleep(STOPPED_SECONDS)
            await_true(
                lambda: ring.is_past(epoch), what=lambda: "The ring waits for the rank.", seconds=NOTICED_SECONDS
            )
        finally:
            ring.kill(VICTIM, "CONT")

    lost = lose_a_rank(ring, where, work=WORK, seed=11, fault=stop_for_a_while)
    _judge(f"SIGSTOP of a rank for {STOPPED_SECONDS:.0f} s", lost, mistakes)
    after = ring.pods()
    assert _uids(after) == _uids(before)
    assert [restarts(pod) for pod in after] == [restarts(pod) for pod in before]


def test_a_deleted_pod(ring: Ring, where: str, stack: Stack, mistakes: Mistakes) -> None:
    """It goes when its drain is over, seconds later: so callers ask one answer after the other until it is back."""
    before, epoch = _uids(ring.pods()), ring.epoch()
    with Caller(ring, Work(output_tokens=200), seed=3000) as caller:
        caller.await_tokens()
        told = time.monotonic()
        stack.kubectl("delete", "pod", ring.name(VICTIM), "-n", ring.namespace, "--wait=false")
        whole_seconds = ring.await_whole(after_epoch=epoch) - told
    tell(
        f"kubectl delete of a rank's pod: back to {SIZE} ranks {whole_seconds:.1f} s, {len(caller.whole())} answers, "
        f"{len(caller.cut())} cut, longest pause {caller.longest_pause():.2f} s"
    )
    after = _uids(ring.pods())
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, True, False]
    assert caller.cut() == []
    assert [found for prompt, answer in caller.whole() if (found := mistakes(prompt, answer.tokens))] == []
    assert caller.longest_pause() <= NEXT_TOKEN_SECONDS
    assert whole_seconds <= WHOLE_SECONDS


def test_a_node_that_is_cut_off_and_comes_back(
    ring: Ring, where: str, stack: Stack, cluster: Cluster, mistakes: Mistakes
) -> None:
    rank = _rank_away_from_the_operator(ring, stack)
    node, zombie = ring.node(rank), str(ring.pod(rank)["metadata"]["uid"])
    bound = cluster.spec.node_grace_seconds + REFORM_GRACE_SECONDS + REJOIN_SECONDS
    try:
        lost = lose_a_rank(ring, where, work=WORK, seed=14, fault=lambda: cluster.cut(node))
        left = engine_processes(cluster, node, zombie)
        assert left, "nobody could tell it to end"
        epoch = ring.epoch()
    finally:
        cluster.heal(node)
    healed = time.monotonic()
    await_true(
        lambda: not engine_processes(cluster, node, zombie),
        what=lambda: (
            f"the zombie still runs: {engine_processes(cluster, node, zombie)}, while cut off {left}; "
            f"it said:\n{engine_log(cluster, node, zombie)}"
        ),
        seconds=ZOMBIE_SECONDS,
    )
    tell(f"the rank on the healed node is gone after {time.monotonic() - healed:.1f} s")
    ring.await_whole()
    time.sleep(LOOK_SECONDS)
    # Before the answer is judged: that takes the processors, which the ranks need for their heartbeats.
    afterwards = ring.epoch()
    _judge("a node is cut off", lost, mistakes, whole_seconds=bound)
    assert ring.node(rank) != node
    assert afterwards == epoch, "the zombie disturbs nobody"
    stack.kubectl("wait", "--for=condition=Ready", f"node/{node}", "--timeout=180s")


def test_rank_0_is_killed_and_the_client_asks_again(ring: Ring, where: str, mistakes: Mistakes) -> None:
    before = _uids(ring.pods())
    retried = lose_rank_0(ring, where, work=WORK, seed=15, fault=lambda: ring.kill(0))
    share = retried.recomputed_times_n(SIZE)
    tell(
        f"kill -9 of rank 0: its restart and load {retried.started_seconds:.1f} s, the retried request's first token "
        f"{retried.answered_seconds:.1f} s, every rank Ready {retried.whole_seconds:.1f} s, {share:.2f}/N computed again"
    )
    assert retried.cut.error is not None, "rank 0 is the one that clients are connected to"
    assert mistakes(retried.prompt, retried.cut.tokens) == []
    assert retried.answer.error is None
    assert mistakes(retried.prompt, retried.answer.tokens) == []
    assert 0 < share <= RECOMPUTED_TIMES_N
    assert _uids(ring.pods()) == before
    assert retried.answered_seconds <= retried.started_seconds + AFTER_START_SECONDS


def _uids(pods: list[Json]) -> list[str]:
    return [str(pod["metadata"]["uid"]) for pod in pods]


def _rank_away_from_the_operator(ring: Ring, stack: Stack) -> int:
    """A rank other than 0 whose node does not run the operator, which is one pod here, and would be lost with it."""
    operators = stack.get(SYSTEM_NAMESPACE, "pods", "-l", "app.kubernetes.io/component=operator")
    nodes = {pod["spec"].get("nodeName") for pod in operators}
    return next(rank for rank in range(1, SIZE) if ring.node(rank) not in nodes)
