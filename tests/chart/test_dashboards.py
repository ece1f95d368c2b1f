"""The dashboards: what Grafana needs to show them, and what a reader needs to understand them."""

import json
import re
from itertools import combinations
from typing import Any

import pytest

from charts.dashboards.reading import asked, filled_in, metrics, panels
from charts.generate import DASHBOARDS
from kvplane_runtime.sidecar.promises import Result

BOARDS: dict[str, dict[str, Any]] = {path.stem: json.loads(path.read_text()) for path in DASHBOARDS.glob("*.json")}
PANELS = [(f"{name}: {panel['title']}", panel) for name, board in BOARDS.items() for panel in panels(board)]
DRAWABLE = {"timeseries", "stat", "bargauge", "table"}
SOURCE = {"type": "prometheus", "uid": "${datasource}"}

each_board = pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
each_panel = pytest.mark.parametrize("panel", [p for _, p in PANELS], ids=[name for name, _ in PANELS])


def test_addresses_stay() -> None:
    """People link to them."""
    assert {board["uid"] for board in BOARDS.values()} == {
        "kvplane-overview",
        "kvplane-kv-memory",
        "kvplane-admission",
        "kvplane-autoscaling",
        "kvplane-operator",
        "kvplane-ring",
    }
    assert {name: board["uid"] for name, board in BOARDS.items()} == {name: f"kvplane-{name}" for name in BOARDS}


@each_board
def test_board(board: dict[str, Any]) -> None:
    assert board["schemaVersion"] == 42
    assert board["tags"] == ["kvplane"]
    assert "id" not in board
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)
    first = next(panel for panel in board["panels"] if panel["type"] == "row")
    assert first["title"].startswith("Is ")
    assert all(panel["title"].endswith("?") for panel in board["panels"] if panel["type"] == "row")


@each_board
def test_variables(board: dict[str, Any]) -> None:
    source, *chosen = board["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    for variable in chosen:
        assert variable["refresh"] == 2
        assert variable["datasource"] == SOURCE
        assert variable["includeAll"]
        assert metrics(variable["query"]["query"])
    used = set(re.findall(r"\$(\w+)", json.dumps([p["targets"] for p in panels(board)])))
    assert used - {"__rate_interval"} == {variable["name"] for variable in chosen}


@each_board
def test_panels_do_not_overlap(board: dict[str, Any]) -> None:
    places = [panel["gridPos"] for panel in board["panels"]]
    for a, b in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or above, (a, b)
    assert all(place["x"] + place["w"] <= 24 for place in places)


@each_panel
def test_panel(panel: dict[str, Any]) -> None:
    assert panel["type"] in DRAWABLE
    assert panel["datasource"] == SOURCE
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    assert steps[0]["value"] is None
    assert [step["value"] for step in steps[1:]] == sorted(step["value"] for step in steps[1:])


@each_panel
def test_queries(panel: dict[str, Any]) -> None:
    names = [target["refId"] for target in panel["targets"]]
    assert len(set(names)) == len(names) > 0
    for target in panel["targets"]:
        assert target["datasource"] == SOURCE
        assert metrics(target["expr"])
        assert target["instant" if panel["type"] == "table" else "range"]
        if panel["type"] != "table":
            assert target["legendFormat"]


@each_panel
def test_a_legend_names_only_labels_that_are_left(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        kept = {label.strip() for by in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in by.split(",")}
        assert set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", ""))) <= kept


@each_panel
def test_time_series_have_a_legend(panel: dict[str, Any]) -> None:
    if panel["type"] == "timeseries":
        assert panel["options"]["legend"]["showLegend"]


def test_the_overview_says_how_many_promises_are_kept_and_why_others_are_not() -> None:
    asking = [p for p in panels(BOARDS["overview"]) if "kvplane_slo_requests_total" in json.dumps(p["targets"])]
    assert {panel["fieldConfig"]["defaults"]["unit"] for panel in asking} == {"percentunit"}
    assert [panel["type"] for panel in asking] == ["stat", "timeseries", "timeseries"]
    for panel in asking:
        named = re.findall(r'\bresult!?="([^"]*)"', panel["targets"][0]["expr"])
        assert named == [Result.MET]
    *_, reasons = asking
    assert all(f"{result}: " in reasons["description"] for result in Result if result is not Result.MET)


def test_rates_follow_the_scrape_interval() -> None:
    """A fixed window is empty for who scrapes less often; only windows of an hour may stand there."""
    for query in asked(DASHBOARDS):
        windows = set(re.findall(r"\[([^\]]+)\]", query.expr))
        assert windows <= {"$__rate_interval", "1h"}, str(query)
        assert "$" not in filled_in(query.expr, rate_interval="1m")
