"""The alerts: each fires when it must and is silent when it must be, and tells its reader what to do."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from charts.generate import REPOSITORY, RULES
from tests.rules import promtool

FOLDER = Path(__file__).parent
RUNBOOKS = REPOSITORY / "docs" / "runbooks"
RULE_LIST: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
]
NAMES = sorted({rule["alert"] for rule in RULE_LIST})
CONTEXTS = ("## What it means", "## What to look at", "## What to do")

each_rule = pytest.mark.parametrize(
    "rule", RULE_LIST, ids=[f"{r['alert']}-{r['labels'].get('cause', '')}".rstrip("-") for r in RULE_LIST]
)


def test_the_alerts_are_these() -> None:
    """Renaming one breaks somebody's routes and silences."""
    assert NAMES == [
        "KVPlaneAdmissionShedding",
        "KVPlaneAutoscalerAtMaximum",
        "KVPlaneAutoscalerBlind",
        "KVPlaneAutoscalerFlapping",
        "KVPlaneKVCapacityMisconfigured",
        "KVPlaneOperatorNotLeading",
        "KVPlaneReplicaCrashLoop",
        "KVPlaneRingDegraded",
        "KVPlaneRingFailed",
        "KVPlaneRingReformStorm",
        "KVPlaneSignalsStale",
        "KVPlaneThrashing",
    ]


def test_prometheus_takes_the_rules() -> None:
    done = promtool.run("check", "rules", "--lint=all", "--lint-fatal", RULES)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_alert(name: str) -> None:
    """The file NAME.test.yaml."""
    done = promtool.run("test", "rules", FOLDER / f"{name}.test.yaml")
    assert done.returncode == 0, done.stdout


@each_rule
def test_each_rule_is_seen_to_fire_and_to_be_silent(rule: dict[str, Any]) -> None:
    groups = yaml.safe_load((FOLDER / f"{rule['alert']}.test.yaml").read_text())["tests"]
    tests = [test for group in groups for test in group["alert_rule_test"]]
    assert {test["alertname"] for test in tests} == {rule["alert"]}
    expected = [alert["exp_labels"] for test in tests for alert in test["exp_alerts"]]
    assert any(rule["labels"].items() <= labels.items() for labels in expected)
    assert any(all(not test["exp_alerts"] for test in group["alert_rule_test"]) for group in groups)


@each_rule
def test_each_rule_tells_its_reader_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("warning", "critical")
    annotations = rule["annotations"]
    assert annotations.keys() == {"summary", "description", "runbook_url"}
    assert "{{" not in annotations["summary"]
    number = r"\{\{ \$value\b|\bquery \}\}"
    assert re.search(number, annotations["description"]), "the description says how much"
    assert annotations["runbook_url"] == f"https://kvplane.dev/runbooks/{rule['alert']}"


def test_each_alert_has_a_runbook() -> None:
    pages = {path.stem: path.read_text() for path in RUNBOOKS.glob("KVPlane*.md")}
    assert sorted(pages) == NAMES
    for name, text in pages.items():
        assert text.startswith(f"# {name}\n")
        assert [context for context in CONTEXTS if context not in text] == [], name
