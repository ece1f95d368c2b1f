"""What is shown to users of other scalers names what there is: our resource, and metrics that are exported."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvplane_api import names
from kvplane_operator import metrics

SAMPLES = Path(__file__).resolve().parents[2] / "docs" / "samples"
FILES = (SAMPLES / "external-hpa.yaml", *sorted((SAMPLES / "external").glob("*.yaml")))
CHAT = {"apiVersion": names.API_VERSION, "kind": names.KIND, "name": "chat"}


def documents() -> dict[str, dict[str, Any]]:
    """By kind; what is no object, by the name of its file."""
    found = [(path, document) for path in FILES for document in yaml.safe_load_all(path.read_text())]
    return {document.get("kind", path.stem): document for path, document in found}


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_metrics_are_exported(path: Path) -> None:
    exported = {family.name for collector in metrics.METRICS for family in collector.describe()}
    named = set(re.findall(r"kvplane_[a-z_]+", path.read_text()))
    assert named
    assert named <= exported


@pytest.mark.parametrize("kind", ["HorizontalPodAutoscaler", "ScaledObject"])
def test_the_scale_target_is_the_service(kind: str) -> None:
    assert documents()[kind]["spec"]["scaleTargetRef"] == CHAT


def test_each_scaler_takes_the_figure_as_it_is() -> None:
    """A target of 1 for each replica makes the metric's value the number of replicas; other windows would come on top."""
    found = documents()
    hpa, keda = found["HorizontalPodAutoscaler"]["spec"], found["ScaledObject"]["spec"]
    (metric,) = hpa["metrics"]
    assert metric["external"]["target"] == {"type": "AverageValue", "averageValue": "1"}
    (trigger,) = keda["triggers"]
    assert (trigger["metricType"], trigger["metadata"]["threshold"]) == ("AverageValue", "1")
    for behavior in (hpa["behavior"], keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]):
        assert {part["stabilizationWindowSeconds"] for part in behavior.values()} == {0}


def test_the_adapter_serves_what_the_hpa_asks_for() -> None:
    found = documents()
    (rule,) = found["prometheus-adapter"]["externalRules"]
    (metric,) = found["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert rule["name"]["as"] == metric["external"]["metric"]["name"]


def test_a_silent_prometheus_lowers_nothing() -> None:
    keda = documents()["ScaledObject"]["spec"]
    assert keda["fallback"]["behavior"] == "currentReplicas"
    assert keda["triggers"][0]["metadata"]["ignoreNullValues"] == "false"
