"""What a shipped dashboard asks of Prometheus: for the tests, the previews, and whoever checks a metric's users."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

EVERYTHING: Final = {"namespace": ".*", "service": ".*", "pod": ".*"}
"""The dashboards' variables with All chosen."""

_METRIC: Final = re.compile(r"\bkvplane_[a-z0-9_]+\b")
_VARIABLE: Final = re.compile(r"\$\{?(\w+)\}?")


@dataclass(frozen=True)
class Asked:
    """One expression of one panel."""

    dashboard: str
    panel: str
    expr: str

    def __str__(self) -> str:
        return f"{self.dashboard} / {self.panel}"


def panels(dashboard: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Its panels, without the rows' headings."""
    return (panel for panel in dashboard["panels"] if panel["type"] != "row")


def asked(folder: Path) -> list[Asked]:
    """Every expression of every panel of the dashboards in a folder."""
    boards = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [
        Asked(board["title"], panel["title"], target["expr"])
        for board in boards
        for panel in panels(board)
        for target in panel["targets"]
    ]


def filled_in(expr: str, *, rate_interval: str, variables: Mapping[str, str] = EVERYTHING) -> str:
    """The expression as Grafana sends it. Raises KeyError for a variable that the dashboards do not have."""
    values = {"__rate_interval": rate_interval, **variables}
    return _VARIABLE.sub(lambda found: values[found.group(1)], expr)


def metrics(expr: str) -> set[str]:
    """Names of the metrics of kvplane in an expression, as they stand there: with _bucket, _total and the like."""
    return set(_METRIC.findall(expr))
