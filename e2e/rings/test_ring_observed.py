"""What Prometheus and Grafana show of a ring that has lost a rank and got it back."""

import time

import pytest

from charts.dashboards.reading import asked, filled_in
from charts.dashboards.ring import TITLE
from charts.generate import DASHBOARDS
from e2e.prometheus import RATE_INTERVAL, Prometheus
from e2e.rings.drill import Work, lose_a_rank
from e2e.rings.ring import Ring
from kvplane_api import names

STEP_SECONDS = 5
BACK_SECONDS = 900


@pytest.fixture(scope="module")
def ended(ring: Ring, prometheus: Prometheus) -> int:
    """Until when a ring was watched that lost a rank, by the tests before or here; seconds since 1970."""
    if not prometheus.query(f'max_over_time(kvplane_ring_reforms_total{{cause="lost"}}[{BACK_SECONDS}s]) > 0'):
        ring.await_whole()
        where = f"{ring.pod(0)['status']['podIP']}:{names.PORT_SERVING}"
        lose_a_rank(ring, where, work=Work(output_tokens=200), seed=30, fault=lambda: ring.kill(1))
    return int(time.time())


def test_no_panel_is_empty(ring: Ring, prometheus: Prometheus, ended: int) -> None:
    variables = {"namespace": ring.namespace, "service": ring.service, "pod": ".*"}
    queries = [query for query in asked(DASHBOARDS) if query.dashboard == TITLE]
    assert len(queries) > 10

    def empty(expr: str) -> bool:
        filled = filled_in(expr, rate_interval=RATE_INTERVAL, variables=variables)
        moments = range(ended, ended - BACK_SECONDS, -STEP_SECONDS)
        return not any(prometheus.query(filled, at=moment) for moment in moments)

    assert [f"{query}: {query.expr}" for query in queries if empty(query.expr)] == []


def test_every_alert_on_rings_watches_something_that_is_there(prometheus: Prometheus, ended: int) -> None:
    selectors = {
        (rule["name"], selector)
        for rule in prometheus.rules()
        for selector in prometheus.selectors(rule["query"])
        if "_ring_" in selector
    }
    assert {name for name, _ in selectors} == {
        "KVPlaneKVCapacityMisconfigured",  # not of rings
        "KVPlaneRingDegraded",
        "KVPlaneRingFailed",
        "KVPlaneRingReformStorm",
    }
    missing = [
        f"{name}: {selector}"
        for name, selector in sorted(selectors)
        if not prometheus.query(f"last_over_time({selector}[1m])", at=ended)
    ]
    assert missing == []
