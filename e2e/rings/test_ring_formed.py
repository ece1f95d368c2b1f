"""One ring on three nodes: Ready, exact beyond what a rank holds, and visible by rank."""

import time

from e2e.prometheus import Prometheus
from e2e.rings.conftest import Mistakes, Service
from e2e.rings.drill import Work
from e2e.rings.ring import Ring
from e2e.rings.service import KV_TOKENS, SIZE
from e2e.rings.streams import ask
from e2e.stack import Stack
from e2e.tests.sidecar import eventually
from e2e.times import tell
from kvplane_api import names

WORK = Work(prompt_tokens=2600, output_tokens=200)
"""More than two of the three ranks hold."""


def test_every_rank_is_ready_on_a_node_of_its_own(stack: Stack, service: Service, ring: Ring) -> None:
    assert len({ring.node(rank) for rank in range(SIZE)}) == SIZE

    def told() -> bool:
        pool = service.pool()
        shown = [pool.get(name) for name in ("kind", "size", "ready")]
        return shown == ["Ring", SIZE, 1] and "degradedGroups" not in pool

    eventually(told, seconds=30, otherwise=service.pool)
    status = stack.get(ring.namespace, "llmservice", ring.service)["status"]
    assert status["mode"] == "Ring"
    assert f"{names.LABEL_POD_INDEX}=0" in status["selector"].split(","), "an autoscaler counts groups, not ranks"


def test_a_prompt_longer_than_a_rank_holds_is_answered_as_by_one_process(
    ring: Ring, where: str, mistakes: Mistakes, prometheus: Prometheus
) -> None:
    prompt, before = WORK.prompt(seed=1), _sent(ring)
    asked = time.monotonic()
    answer = ask(where, ring.service, prompt, count=WORK.output_tokens)
    assert answer.error is None
    assert mistakes(prompt, answer.tokens) == []
    tell(
        f"{len(prompt)} tokens on ranks of {KV_TOKENS}: the first token {answer.at[0] - asked:.2f} s, all {len(answer.tokens)} "
        f"{answer.at[-1] - asked:.2f} s, none wrong"
    )

    of_rank_0 = f'namespace="{ring.namespace}", service="{ring.service}", pod="{ring.name(0)}"'

    def by_rank(expr: str) -> dict[str, float]:
        return {found.labels["rank"]: found.value for found in prometheus.query(expr)}

    def held() -> dict[str, float]:
        return by_rank(f'kvplane_ring_kv_tokens{{state="held", {of_rank_0}}}')

    def told_to_have_sent() -> set[str]:
        return set(by_rank(f"kvplane_ring_sent_bytes_total{{{of_rank_0}}}"))

    def shared() -> bool:
        found = held()
        return found.keys() == ranks and all(len(prompt) // SIZE <= tokens <= KV_TOKENS for tokens in found.values())

    ranks = {str(rank) for rank in range(SIZE)}
    eventually(shared, seconds=30, otherwise=held)
    # A target that misses a scrape has no series until the next one.
    eventually(lambda: told_to_have_sent() == ranks, seconds=30, otherwise=told_to_have_sent)
    ring.await_idle()
    sent = [after - at_first for after, at_first in zip(_sent(ring), before, strict=True)]
    # Every rank sends what it has to the next one: about the same for all.
    assert min(sent) > 0.8 * max(sent) > 0, sent


def _sent(ring: Ring) -> list[float]:
    """Bytes sent so far, by rank."""
    return [ring.value("kvplane_ring_sent_bytes_total", rank=str(rank)) for rank in range(SIZE)]


def test_every_rank_is_scraped(ring: Ring, prometheus: Prometheus) -> None:
    """Workers tell of themselves too: what rank 0 says of them ends with rank 0."""
    of_ring = f'{{__name__=~"kvplane_ring_.+", namespace="{ring.namespace}", service="{ring.service}"}}'
    pods = {ring.name(rank) for rank in range(SIZE)}

    def scraped() -> set[str]:
        return {found.labels["pod"] for found in prometheus.query(f"count by (pod) ({of_ring})")}

    eventually(lambda: pods <= scraped(), seconds=30, otherwise=scraped)
