"""Conditions: transition times move with the status only, and nothing foreign is lost."""

from datetime import UTC, datetime, timedelta
from typing import Any

from kvplane_api.conditions import MESSAGE_LIMIT, Condition, Reason, Status, Type, merge

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
LATER = NOON + timedelta(minutes=1)


def available(status: Status, reason: Reason, message: str = "") -> Condition:
    return Condition(Type.AVAILABLE, status, reason, message)


def at(now: datetime, *wanted: Condition, observed: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    return merge(observed or [], wanted, generation=7, now=now)


def test_a_new_condition_has_all_fields() -> None:
    assert at(NOON, available("False", Reason.STARTING, "Wait.")) == [
        {
            "type": "Available",
            "status": "False",
            "reason": "Starting",
            "message": "Wait.",
            "observedGeneration": 7,
            "lastTransitionTime": "2026-01-01T12:00:00Z",
        }
    ]


def test_the_transition_time_stays_while_the_status_does() -> None:
    before = at(NOON, available("False", Reason.STARTING))
    (after,) = at(LATER, available("False", Reason.UNSCHEDULABLE, "No node."), observed=before)
    assert (after["reason"], after["lastTransitionTime"]) == ("Unschedulable", "2026-01-01T12:00:00Z")


def test_the_transition_time_moves_with_the_status() -> None:
    before = at(NOON, available("False", Reason.STARTING))
    (after,) = at(LATER, available("True", Reason.MINIMUM_REPLICAS_AVAILABLE), observed=before)
    assert after["lastTransitionTime"] == "2026-01-01T12:01:00Z"


def test_merging_twice_changes_nothing() -> None:
    wanted = available("True", Reason.MINIMUM_REPLICAS_AVAILABLE, "1 of 1 replicas serve.")
    once = at(NOON, wanted)
    assert at(LATER, wanted, observed=once) == once


def test_conditions_of_others_are_kept() -> None:
    foreign = {"type": "example.com/Audited", "status": "True"}
    assert at(NOON, available("True", Reason.MINIMUM_REPLICAS_AVAILABLE), observed=[foreign])[1] == foreign


def test_long_messages_are_cut() -> None:
    (cut,) = at(NOON, available("False", Reason.ENGINE_CRASHED, "x" * 10_000))
    assert len(cut["message"]) == MESSAGE_LIMIT
