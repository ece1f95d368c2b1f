"""The Grafana dashboards, written in Python and shipped as JSON in the chart: ``make generate`` writes them.

Each goes from "is it fine?" at the top to "why not?" at the bottom. They need Prometheus with the labels namespace,
service (the LLMService) and pod on every series of a sidecar: docs/dashboards.md.
"""

from pathlib import Path

from charts.dashboards.admission import admission
from charts.dashboards.autoscaling import autoscaling
from charts.dashboards.kv_memory import kv_memory
from charts.dashboards.operator import operator
from charts.dashboards.overview import overview
from charts.dashboards.ring import ring


def outputs(folder: Path) -> dict[Path, str]:
    """The dashboards' JSON by the file in `folder` that holds it."""
    return {
        folder / "overview.json": overview(),
        folder / "kv-memory.json": kv_memory(),
        folder / "admission.json": admission(),
        folder / "autoscaling.json": autoscaling(),
        folder / "operator.json": operator(),
        folder / "ring.json": ring(),
    }
