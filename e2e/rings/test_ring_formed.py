"""One ring on three nodes: Ready, exact beyond what a rank holds, and visible by rank."""

from e2e.prometheus import Prometheus
from e2e.rings.conftest import Mistakes
from e2e.rings.drill import Work
from e2e.rings.ring import Ring
from e2e.rings.service import KV_TOKENS, SIZE
from e2e.rings.streams import ask
from e2e.rings.times import tell
from e2e.stack import Stack
from e2e.tests.sidecar import eventually
from kvplane_api import names

WORK = Work(prompt_tokens=2600, output_tokens=200)
"""More than two of the three ranks hold."""


def test_every_rank_is_ready_on_a_node_of_its_own(stack: Stack, ring: Ring) -> None:
    assert len({ring.node(rank) for rank in range(SIZE)}) == SIZE
    status = stack.get(ring.namespace, "llmservice", ring.service)["status"]
    (pool,) = status["pools"]
    assert (status["mode"], pool["kind"], pool["size"], pool["replicas"], pool["ready"]) == ("Ring", "Ring", SIZE, 1, 1)
    assert "degradedGroups" not in pool
    conditions = stack.conditions(ring.namespace, ring.service)
    assert {conditions[kind]["status"] for kind in ("Accepted", "Available", "Ready")} == {"True"}
    assert f"{names.LABEL_POD_INDEX}=0" in status["selector"].split(","), "an autoscaler counts groups, not ranks"


def test_a_prompt_longer_than_a_rank_holds_is_answered_as_by_one_process(
    ring: Ring, where: str, mistakes: Mistakes, prometheus: Prometheus
) -> None:
    prompt = WORK.prompt(seed=1)
    answer = ask(where, ring.service, prompt, count=WORK.output_tokens)
    assert answer.error is None
    assert mistakes(prompt, answer.tokens) == []
    tell(f"{len(prompt)} tokens on ranks of {KV_TOKENS}: {len(answer.tokens)} tokens, none wrong")

    of_rank_0 = f'namespace="{ring.namespace}", service="{ring.service}", pod="{ring.name(0)}"'

    def by_rank(expr: str) -> dict[str, float]:
        return {found.labels["rank"]: found.value for found in prometheus.query(expr)}

    def held() -> dict[str, float]:
        return by_rank(f'kvplane_ring_kv_tokens{{state="held", {of_rank_0}}}')

    eventually(lambda: sum(held().values()) >= len(prompt), seconds=30, otherwise=held)
    ranks = {str(rank) for rank in range(SIZE)}
    assert set(held()) == ranks
    assert all(len(prompt) // SIZE <= tokens <= KV_TOKENS for tokens in held().values()), held()
    sent = by_rank(f"kvplane_ring_sent_bytes_total{{{of_rank_0}}}")
    assert set(sent) == ranks
    # Every rank sends what it has to the next one: about the same for all.
    assert min(sent.values()) > 0.8 * max(sent.values()), sent


def test_every_rank_is_scraped(ring: Ring, prometheus: Prometheus) -> None:
    """Workers tell of themselves too: what rank 0 says of them ends with rank 0."""
    of_ring = f'{{__name__=~"kvplane_ring_.+", namespace="{ring.namespace}", service="{ring.service}"}}'
    pods = {ring.name(rank) for rank in range(SIZE)}

    def scraped() -> set[str]:
        return {found.labels["pod"] for found in prometheus.query(f"count by (pod) ({of_ring})")}

    eventually(lambda: pods <= scraped(), seconds=30, otherwise=scraped)
