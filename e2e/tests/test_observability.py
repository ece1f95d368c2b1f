"""What users see of kvplane in Prometheus and Grafana, from a real Prometheus that watched the cluster under overload."""

from charts.dashboards.reading import Asked, asked, filled_in
from charts.dashboards.ring import TITLE as OF_RINGS
from charts.generate import DASHBOARDS
from e2e.prometheus import RATE_INTERVAL
from e2e.stack import SYSTEM_NAMESPACE
from e2e.tests import overload as scenario
from e2e.tests.fleet import Fleet
from e2e.tests.overload import Overload
from e2e.tests.sidecar import eventually

STEP_SECONDS = 10
AUTOSCALING = "kvplane / Autoscaling"
"""Its panels and alerts are looked at in test_autoscaling: nothing scales by itself here."""


def test_engines_and_operator_are_found_and_scraped(overload: Overload, fleet: Fleet) -> None:
    def scraped() -> set[tuple[str, str, str]]:
        return {
            (t["labels"]["job"], t["labels"]["namespace"], t["labels"].get("service", ""))
            for t in overload.prometheus.targets()
            if t["health"] == "up"
        }

    engines = {("kvplane-engines", namespace, name) for name, namespace in fleet.namespaces.items()}
    wanted = engines | {("kvplane-operator", SYSTEM_NAMESPACE, "")}
    # A busy target misses a scrape now and then, and is down until the next one.
    eventually(lambda: wanted <= scraped(), seconds=30, otherwise=scraped)


def test_no_panel_is_empty(overload: Overload, fleet: Fleet) -> None:
    """Every query of every panel answers with a figure of these services, at one moment or another of the overload."""
    namespaces = "|".join(sorted({*fleet.namespaces.values(), SYSTEM_NAMESPACE}))
    variables = {"namespace": namespaces, "service": "|".join(fleet.namespaces), "pod": ".*"}

    def empty(query: Asked) -> bool:
        expr = filled_in(query.expr, rate_interval=RATE_INTERVAL, variables=variables)
        moments = range(overload.ended, overload.began, -STEP_SECONDS)
        return not any(overload.prometheus.query(expr, at=moment) for moment in moments)

    elsewhere = (AUTOSCALING, OF_RINGS)  # nothing scales by itself here, and no ring runs: test_autoscaling, e2e/rings
    queries = [query for query in asked(DASHBOARDS) if query.dashboard not in elsewhere]
    assert len(queries) > 50
    assert [f"{query}: {query.expr}" for query in queries if empty(query)] == []


def test_every_alert_watches_something_that_is_there(overload: Overload) -> None:
    """Each vector selector of each rule matches a live series: a renamed metric or label would silence the alert."""
    prometheus = overload.prometheus
    rules = prometheus.rules()
    assert len(rules) >= 6
    selectors = {(rule["name"], selector) for rule in rules for selector in prometheus.selectors(rule["query"])}
    assert {name for name, _ in selectors} == {rule["name"] for rule in rules}
    absent = ("_ring_", "kvplane_autoscaler_")  # no ring runs here, and nothing scales by itself
    selectors = {(name, selector) for name, selector in selectors if not any(each in selector for each in absent)}
    # Of the last minute: a busy target misses a scrape now and then.
    missing = [
        f"{name}: {s}"
        for name, s in sorted(selectors)
        if not prometheus.query(f"last_over_time({s}[1m])", at=overload.ended)
    ]
    assert missing == []


def test_rules_are_evaluated(overload: Overload) -> None:
    assert [rule for rule in overload.prometheus.rules() if rule["health"] != "ok"] == []


def test_nothing_is_wrong_that_is_not(overload: Overload, fleet: Fleet) -> None:
    """Refusing for minutes is no alert; of all alerts only the one on thrashing fires, for the service let loose."""
    ours = {*fleet.namespaces.values(), SYSTEM_NAMESPACE}
    fired = overload.prometheus.fired(start=overload.began, end=overload.ended)
    expected = (scenario.ALERT, fleet.namespaces[scenario.LET_LOOSE], scenario.LET_LOOSE)
    assert {alert for alert in fired if alert[1] in ours} == {expected}
