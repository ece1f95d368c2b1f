"""A ring under kvplane's operator: a rank killed, and rank 0 killed, in turns."""

import math
from collections.abc import Callable
from typing import Any, Final

from bench.ring_recovery.figures import Fault, Rank0
from e2e.cluster.cluster import Cluster
from e2e.cluster.progress import Progress
from e2e.rings.drill import Work, lose_a_rank, lose_rank_0
from e2e.rings.ring import Ring
from e2e.rings.service import ring_service
from e2e.rings.watching import PodWatch
from e2e.stack import Images, Stack
from e2e.tests.client import address
from e2e.tests.fleet import reachable

NAMESPACE: Final = "bench-kvplane"
NAME: Final = "ring"

Mistakes = Callable[[list[int], list[int]], list[int]]
"""Of a prompt and its answer: indices of tokens that the unsharded model would not have given."""


def measure(
    stack: Stack,
    cluster: Cluster,
    images: Images,
    mistakes: Mistakes,
    *,
    ranks: int,
    victim: int,
    work: Work,
    rounds: int,
    progress: Progress,
) -> tuple[list[Fault], list[Rank0]]:
    """The service is made, hurt and removed."""
    stack.make_namespace(NAMESPACE)
    stack.apply(service(images, ranks=ranks, rounds=rounds))
    stack.wait_ready(NAMESPACE, NAME)
    ring = Ring(cluster, NAMESPACE, NAME, ranks)
    ring.await_whole()
    reachable(stack, NAMESPACE, NAME)
    where = address(stack, NAMESPACE, NAME)
    faults: list[Fault] = []
    leaders: list[Rank0] = []
    for number in range(rounds):
        with progress.step(f"kvplane: a rank is killed, {number + 1} of {rounds}") as step:
            with PodWatch(stack, NAMESPACE, ring.selector) as watch:
                lost = lose_a_rank(ring, where, work=work, seed=2 * number, fault=lambda: ring.kill(victim))
            went_on = lost.answer.error is None
            # A stream that was cut has no next token: what came after the kill was on its way already.
            kept = lost.next_token_seconds if went_on else math.inf
            step.detail = f"next token {kept:.2f} s"
            faults.append(
                Fault(
                    next_token_seconds=kept,
                    whole_seconds=lost.whole_seconds,
                    recomputed_times_n=lost.recomputed_times_n(ranks),
                    pods_recreated=len(watch.uids()) - ranks,
                    went_on=went_on,
                    equal=went_on and not mistakes(lost.prompt, lost.answer.tokens),
                )
            )
        with progress.step(f"kvplane: rank 0 is killed, {number + 1} of {rounds}") as step:
            retried = lose_rank_0(ring, where, work=work, seed=2 * number + 1, fault=lambda: ring.kill(0))
            step.detail = f"first token {retried.answered_seconds:.2f} s"
            leaders.append(
                Rank0(
                    next_token_seconds=retried.answered_seconds,
                    started_seconds=retried.started_seconds,
                    recomputed_times_n=retried.recomputed_times_n(ranks),
                    equal=retried.answer.error is None and not mistakes(retried.prompt, retried.answer.tokens),
                )
            )
    stack.kubectl("delete", "namespace", NAMESPACE)
    return faults, leaders


def service(images: Images, *, ranks: int, rounds: int) -> dict[str, Any]:
    """One ring, with a budget for two kills in each round: with less it would be given up while its rank 0 loads."""
    budget = {"restartBudget": 2 * rounds}
    return ring_service(NAME, NAMESPACE, f"oci://{images.model}", size=ranks, recovery=budget)
