"""Autoscaling of the real vLLM: from zero to two, blind, down to one, up at a step of load, to zero and awake (elastic.py)."""

from charts.dashboards.reading import Asked, asked, filled_in
from charts.generate import DASHBOARDS
from e2e.prometheus import RATE_INTERVAL
from e2e.tests import elastic as scenario
from e2e.tests.elastic import Elastic

DASHBOARD = "kvplane / Autoscaling"
STEP_SECONDS = 10
TICK_SECONDS = 5.0
"""From a signal to the Deployment: reading, deciding and writing are within it."""
AGE_SECONDS = 1.0
"""A sidecar looks at its engine once a second: while the load of one replica is just passed, it may tell here of too much and
the operator, whose turn it is then, of enough. Looking at the Deployment from here is within it too: it is done every 0.2 s."""
BUSY_SECONDS = 3.0
"""For kubectl, which asks for a wake-up, and for deciding and writing, on two cores that engines load."""


def test_the_second_replica_is_asked_for_within_a_tick_of_the_overload(elastic: Elastic) -> None:
    assert elastic.asked_seconds <= TICK_SECONDS + AGE_SECONDS


def test_the_step_is_served_and_nothing_is_lost_on_the_way_down(elastic: Elastic) -> None:
    for name, load, least in (("step", elastic.step, 5), ("light", elastic.light, 10)):
        assert load.lost == [], name
        assert load.done >= least, f"{name}: {load.done} in {load.seconds} s"


def test_what_goes_is_what_the_autoscaler_chose(elastic: Elastic) -> None:
    """A ReplicaSet takes the pod with the lowest cost first; without one it is 0."""
    assert elastic.victim_cost is not None
    assert elastic.victim_cost < 0


def test_blind_nothing_is_lowered(elastic: Elastic) -> None:
    """Though it would have been: it was as soon as the operator saw again."""
    assert elastic.blind.ended - elastic.blind.began >= scenario.CUT_SECONDS - 1
    assert elastic.blind.free_seconds >= scenario.FREE_SECONDS
    assert elastic.blind.asked == {2}


def test_blind_it_says_so(elastic: Elastic) -> None:
    assert ("SignalsFresh", "False", "SidecarUnreachable") in elastic.blind.conditions
    assert ("ScalingActive", "False", "ScalerBlind") in elastic.blind.conditions
    assert ("Available", "False") not in {found[:2] for found in elastic.blind.conditions}
    assert (scenario.ALERT, elastic.namespace, scenario.NAME) in elastic.blind.fired


def test_it_recovers_by_itself(elastic: Elastic) -> None:
    reasons = {kind: condition["reason"] for kind, condition in elastic.seen_again.items()}
    assert reasons == {"SignalsFresh": "SignalsRead", "ScalingActive": "FollowsDemand"}


def test_from_zero_it_wakes_at_once(elastic: Elastic) -> None:
    assert max(elastic.wake_seconds) <= 1.0 + BUSY_SECONDS
    assert elastic.answer["usage"]["completion_tokens"] <= 4


def test_every_change_has_an_event_with_its_numbers(elastic: Elastic) -> None:
    changes = {(reason, message.partition(" replicas: ")[0]) for reason, message in elastic.events}
    expected = {
        ("Woken", "From 0 to 2"),
        ("ScaledDown", "From 2 to 1"),
        ("ScaledToZero", "From 1 to 0"),
        ("Woken", "From 0 to 1"),
    }
    assert expected <= changes, elastic.events
    # Where more than two are needed, the event says so.
    assert changes & {(reason, "From 1 to 2") for reason in ("ScaledUp", "AtMaximum")}, elastic.events
    for _, message in elastic.events:
        if message.startswith("From "):
            assert "demand" in message
            assert "ready" in message


def test_no_panel_of_its_dashboard_is_empty(elastic: Elastic) -> None:
    """Every query answers with a figure of this service, at one moment or another."""
    variables = {"namespace": elastic.namespace, "service": scenario.NAME}

    def empty(query: Asked) -> bool:
        expr = filled_in(query.expr, rate_interval=RATE_INTERVAL, variables=variables)
        moments = range(elastic.ended, elastic.began, -STEP_SECONDS)
        return not any(elastic.prometheus.query(expr, at=moment) for moment in moments)

    queries = [query for query in asked(DASHBOARDS) if query.dashboard == DASHBOARD]
    assert len(queries) > 20
    assert [f"{query}: {query.expr}" for query in queries if empty(query)] == []


def test_its_alerts_watch_something_that_is_there(elastic: Elastic) -> None:
    prometheus = elastic.prometheus
    selectors = {
        selector
        for rule in prometheus.rules()
        for selector in prometheus.selectors(rule["query"])
        if "kvplane_autoscaler_" in selector
    }
    assert len(selectors) >= 4
    missing = [s for s in sorted(selectors) if not prometheus.query(f"last_over_time({s}[1m])", at=elastic.ended)]
    assert missing == []


def test_no_other_alert_of_its_own_fires(elastic: Elastic) -> None:
    fired = elastic.prometheus.fired(start=elastic.began, end=elastic.ended)
    ours = {name for name, namespace, _ in fired if namespace == elastic.namespace and "Autoscaler" in name}
    assert ours == {scenario.ALERT}
