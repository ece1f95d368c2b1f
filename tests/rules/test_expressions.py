"""Panels and alerts on an hour of made-up series, read by a real Prometheus: no panel is empty, no selector without match.

What they show on a cluster is e2e/tests/test_observability.py; here a mistake in an expression is found in seconds.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from charts.dashboards.reading import Asked, asked, filled_in
from charts.generate import DASHBOARDS
from charts.preview import sample
from e2e import prometheus
from e2e.cluster.progress import Progress
from e2e.prometheus import Prometheus
from tests.rules import promtool

QUERIES = asked(DASHBOARDS)


@dataclass(frozen=True)
class Hour:
    """A Prometheus that has the hour, and the moment of its end."""

    prometheus: Prometheus
    end: int

    def value(self, expr: str, *, minute: int) -> float:
        (found,) = self.prometheus.query(expr, at=self.end - sample.HOUR_SECONDS + 60 * minute)
        return found.value


@pytest.fixture(scope="module")
def hour(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hour]:
    folder = tmp_path_factory.mktemp("hour")
    end = int(time.time())
    (folder / "series").write_text(sample.openmetrics(end))
    done = promtool.run("tsdb", "create-blocks-from", "openmetrics", "--quiet", folder / "series", folder / "data")
    assert done.returncode == 0, done.stdout
    rules = {"rule_files": [str(prometheus.RULES)]}
    with prometheus.running(rules, folder, progress=Progress(quiet=True)) as found:
        yield Hour(found, end)


@pytest.mark.parametrize("query", QUERIES, ids=[f"{query}-{number}" for number, query in enumerate(QUERIES)])
def test_no_panel_is_empty(hour: Hour, query: Asked) -> None:
    # In the overload, since a figure of refused requests needs some.
    at = hour.end - sample.HOUR_SECONDS + 30 * 60
    assert hour.prometheus.query(filled_in(query.expr, rate_interval="2m"), at=at), query.expr


def test_panels_show_what_happened(hour: Hour) -> None:
    expressions = {str(query): filled_in(query.expr, rate_interval="2m") for query in QUERIES}
    refused = expressions["kvplane / Admission / Requests refused"]
    assert hour.value(refused, minute=10) < 0.01
    assert hour.value(refused, minute=33) == pytest.approx(0.45 / 3, abs=0.02)  # one of three replicas refuses 45 %
    kept = expressions["kvplane / Overview / Promises kept"]
    assert hour.value(kept, minute=10) > 0.99
    assert hour.value(kept, minute=33) == pytest.approx(
        (1 + 0.3 + 0.55) / 3, abs=0.03
    )  # all is well, thrashing, refusing
    thrashing = expressions["kvplane / Overview / Replicas thrashing"]
    assert (hour.value(thrashing, minute=10), hour.value(thrashing, minute=33)) == (0, 1)
    assert hour.value(expressions["kvplane / Overview / Services not ready"], minute=10) == 1
    assert hour.value(expressions["kvplane / Overview / Replicas missing"], minute=10) == 1


def test_each_alert_selects_series(hour: Hour) -> None:
    """The same as on the cluster: a selector without a match would make its alert silent."""
    at = hour.end - sample.HOUR_SECONDS + 30 * 60
    rules = hour.prometheus.rules()
    assert rules
    for rule in rules:
        selectors = hour.prometheus.selectors(rule["query"])
        assert selectors
        for selector in selectors:
            assert hour.prometheus.query(selector, at=at), f"{rule['name']}: {selector}"
