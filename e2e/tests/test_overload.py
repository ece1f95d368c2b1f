"""Admission on the real vLLM: three services under overload, one of them let loose after a while (see overload.py)."""

from e2e.tests import overload as scenario
from e2e.tests.overload import Overload

DECIDING = ("directory", scenario.ITS_TWIN)
"""The services whose admission decided all the time."""


def test_no_preemption_storm(overload: Overload) -> None:
    """Little in the first seconds, in which pods that are new learn how long outputs get; then next to nothing.

    `volume` has no setting of its own, and the load that thrashes where admission is off.
    """
    for name, part in overload.enforced.items():
        assert part.processed_tokens > 500, f"{name} had nothing to do: {part}"
        assert part.wasted_tokens <= 0.1 * part.processed_tokens, f"{name} at first: {part}"
    for name in DECIDING:
        part = overload.whole[name]
        assert part.wasted_tokens <= 0.02 * part.processed_tokens, f"{name}: {part}"


def test_the_load_is_one_that_thrashes(overload: Overload) -> None:
    """As many callers as `volume` has, who ask for the same, at an engine with the same arguments, without admission."""
    part = overload.whole[scenario.LET_LOOSE]
    assert part.wasted_tokens > 0.05 * part.processed_tokens, part


def test_worst_case_reservations_leave_nothing_to_preempt(overload: Overload) -> None:
    assert overload.whole["directory"].preemptions == 0


def test_refusals_say_why_and_when_to_come_back(overload: Overload) -> None:
    refusals = [refusal for load in overload.loads.values() for refusal in load.refusals]
    assert refusals
    for refusal in refusals:
        assert 1 <= refusal.retry_after <= 30
        assert refusal.headers["x-kvplane-reason"] in ("kv", "prefill", "sequences", "queue-full", "deadline")
        error = refusal.body["error"]
        assert error["code"] == "engine_overloaded"
        assert error["message"].endswith(f"retry in {refusal.retry_after} s.")


def test_who_comes_back_when_told_gets_in(overload: Overload) -> None:
    """Four of five; what can be expected of whom, overload.py says. `volume` has room for all to wait and may refuse nobody."""
    assert overload.loads["directory"].came_back > 0, "directory refused nobody"
    for name in DECIDING:
        load = overload.loads[name]
        assert load.got_in >= 0.8 * load.came_back, f"{name}: {load.got_in} of {load.came_back}, {load.done} in all"


def test_nothing_is_lost_or_cut(overload: Overload) -> None:
    assert {name: load.lost for name, load in overload.loads.items()} == {name: [] for name in overload.loads}
    assert all(load.done > 10 for load in overload.loads.values())


def test_nothing_stays_reserved(overload: Overload) -> None:
    for name, admission in overload.settled.items():
        held = {field: admission[field] for field in ("running", "queued", "reservedTokens")}
        assert held == {"running": 0, "queued": 0, "reservedTokens": 0}, name


def test_policy_changes_without_a_restart(overload: Overload) -> None:
    assert overload.policies == ("Observe", "Off", "Enforce")
    assert overload.pods_after == overload.pods_before


def test_alert_fires_where_admission_is_off_and_nowhere_else(overload: Overload) -> None:
    """Admission kept `volume` from it for longer than the alert needs, under the same load."""
    assert overload.ended - overload.began > scenario.ALERT_NEEDS_SECONDS
    fired = overload.prometheus.fired(start=overload.began, end=overload.ended)
    assert {service for name, _, service in fired if name == scenario.ALERT} == {scenario.LET_LOOSE}, overload.whole
