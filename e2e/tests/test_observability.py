"""What users see of kvplane in Prometheus and Grafana, from a real Prometheus that watches the cluster under load."""

import json
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from charts.dashboards.reading import Asked, asked, filled_in
from charts.generate import DASHBOARDS
from e2e.prometheus import RATE_INTERVAL, Prometheus, running, watching
from e2e.stack import SYSTEM_NAMESPACE, Stack
from e2e.tests.client import Load, address
from e2e.tests.conftest import PROGRESS

BUSY = 40
"""Callers at once: more than the service takes (engine.maxSequences 16), so that some are refused."""


@pytest.fixture(scope="module")
def prometheus(stack: Stack, chat: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It watches the service `chat`, which for now holds no queue and is asked for more than it takes."""
    with running(watching(stack.kubeconfig), tmp_path_factory.mktemp("prometheus"), progress=PROGRESS) as found:
        _hold_queue(stack, chat, 0)  # seen by Prometheus: the operator reconciles, the sidecar reloads
        with Load(address(stack, chat, "chat"), "chat", workers=BUSY):
            yield found
        _hold_queue(stack, chat, None)


def _hold_queue(stack: Stack, namespace: str, requests: int | None) -> None:
    """Set, or with None unset, how many requests may wait; it reaches the sidecar without a restart."""
    change = json.dumps({"spec": {"admission": {"queue": {"maxRequests": requests}}}})
    stack.kubectl("patch", "llms", "chat", "-n", namespace, "--type=merge", f"--patch={change}")


def test_engines_and_operator_are_found_and_scraped(prometheus: Prometheus, chat: str) -> None:
    def scraped() -> set[tuple[str, str, str]]:
        return {
            (t["labels"]["job"], t["labels"]["namespace"], t["labels"].get("service", ""))
            for t in prometheus.targets()
            if t["health"] == "up"
        }

    wanted = {("kvplane-engines", chat, "chat"), ("kvplane-operator", SYSTEM_NAMESPACE, "")}
    _eventually(lambda: sorted(wanted - scraped()), seconds=30)


def test_no_panel_is_empty(prometheus: Prometheus, chat: str) -> None:
    """Every query of every panel answers with a figure of this service, at one moment or another of a busy minute."""
    variables = {"namespace": f"{chat}|{SYSTEM_NAMESPACE}", "service": "chat", "pod": ".*"}
    empty = asked(DASHBOARDS)
    assert len(empty) > 50

    def still_empty() -> list[str]:
        empty[:] = [query for query in empty if not prometheus.query(concrete(query))]
        return [f"{query}: {query.expr}" for query in empty]

    def concrete(query: Asked) -> str:
        return filled_in(query.expr, rate_interval=RATE_INTERVAL, variables=variables)

    _eventually(still_empty, seconds=120)


def test_every_alert_watches_something_that_is_there(prometheus: Prometheus) -> None:
    """Each vector selector of each rule matches a live series: a renamed metric or label would silence the alert."""
    rules = prometheus.rules()
    assert len(rules) >= 6
    selectors = {(rule["name"], selector) for rule in rules for selector in prometheus.selectors(rule["query"])}
    assert {name for name, _ in selectors} == {rule["name"] for rule in rules}
    selectors = {(name, selector) for name, selector in selectors if "_ring_" not in selector}  # no ring runs here
    _eventually(lambda: [f"{name}: {s}" for name, s in sorted(selectors) if not prometheus.query(s)], seconds=30)


def test_rules_are_evaluated(prometheus: Prometheus) -> None:
    _eventually(lambda: [rule for rule in prometheus.rules() if rule["health"] != "ok"], seconds=30)


def test_nothing_is_wrong_that_is_not(prometheus: Prometheus, chat: str) -> None:
    """Refusing for a minute is no alert, and with admission the engine does not thrash."""
    assert {name for name, namespace in prometheus.firing() if namespace in (chat, SYSTEM_NAMESPACE)} == set()


def _eventually(left: Callable[[], Sequence[object]], *, seconds: float) -> None:
    """Wait until nothing is left; fails with what is."""
    end = time.monotonic() + seconds
    while found := left():
        assert time.monotonic() < end, "\n".join(map(str, found))
        time.sleep(1)
