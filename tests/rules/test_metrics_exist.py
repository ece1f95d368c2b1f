"""Panels and rules name only metrics, labels' values aside, that the code exports: a renamed one would leave them empty."""

import json
from collections.abc import Iterator

import pytest
import yaml

from charts.dashboards.reading import asked, metrics
from charts.generate import DASHBOARDS, RULES
from kvplane_operator import metrics as operator_metrics
from kvplane_runtime.ring import metrics as ring_metrics
from kvplane_runtime.sidecar import metrics as sidecar_metrics


def exported() -> Iterator[str]:
    """Every series name of sidecar, operator and, through its sidecar, the ring engine."""
    for metric in sidecar_metrics.METRICS:
        yield from _series(metric.name, metric.kind)
    for of_ring in (*ring_metrics.METRICS, *ring_metrics.WORKER_METRICS):
        yield from _series(of_ring.name, of_ring.kind)
    for collector in operator_metrics.METRICS:
        for family in collector.describe():
            yield from _series(family.name, family.type)


def _series(name: str, kind: str) -> list[str]:
    if kind == "histogram":
        return [f"{name}{suffix}" for suffix in ("_bucket", "_sum", "_count")]
    return [f"{name}_total"] if kind == "counter" else [name]


USES = {(str(query), metric) for query in asked(DASHBOARDS) for metric in metrics(query.expr)} | {
    (f"alert {rule['alert']}", metric)
    for group in yaml.safe_load(RULES.read_text())["groups"]
    for rule in group["rules"]
    for metric in metrics(json.dumps(rule))
}
"""(panel or alert, metric)."""


def test_every_panel_uses_a_metric() -> None:
    assert {str(query) for query in asked(DASHBOARDS)} <= {user for user, _ in USES}


@pytest.mark.parametrize("name", sorted({metric for _, metric in USES}))
def test_metric_exists(name: str) -> None:
    users = sorted(user for user, metric in USES if metric == name)
    assert name in set(exported()), f"{name} is used by {', '.join(users)} and exported nowhere."


def test_variables_look_up_metrics_that_exist() -> None:
    for path in DASHBOARDS.glob("*.json"):
        for variable in json.loads(path.read_text())["templating"]["list"]:
            if variable["type"] == "query":
                assert metrics(variable["query"]["query"]) <= set(exported())
