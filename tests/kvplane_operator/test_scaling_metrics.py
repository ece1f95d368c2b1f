"""Every input and output of a decision is exported, and what is not known is absent."""

from dataclasses import replace

from prometheus_client import CollectorRegistry

from kvplane_operator.autoscaler.flows import Meter
from kvplane_operator.autoscaler.forecast import Method
from kvplane_operator.autoscaler.history import fresh
from kvplane_operator.autoscaler.law import Reason, decide
from kvplane_operator.autoscaler.room import Answers, restored
from kvplane_operator.autoscaler.settings import Settings
from kvplane_operator.autoscaler.signals import Signals
from kvplane_operator.scaling_metrics import AutoscalerCollector, Counts, Report
from tests.kvplane_operator.autoscaler.world import CAPACITY, START, TUNING, USABLE, World, reading, replica

CHAT = {"namespace": "team", "service": "chat"}
SETTINGS = Settings(min_replicas=1, max_replicas=9)


def exported(report: Report) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(AutoscalerCollector(lambda: (report,), clock=lambda: report.at + 3))
    return registry


def report(signals: Signals, counts: Counts | None = None) -> Report:
    """What was decided on these, with nothing known before."""
    decision = decide(signals, fresh(TUNING), SETTINGS, START)
    return Report("team", "chat", SETTINGS, signals, decision, START, counts or Counts())


def lived(seconds: float = 900.0) -> Report:
    """What was decided last in a service that grew from one replica to three."""
    world = World(lambda at: 0.6 if at < 300 else 2.2, settings=SETTINGS)
    decision = world.run(seconds)[-1]
    return Report("team", "chat", SETTINGS, world.signals(), decision, world.now, Counts())


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"kvplane_autoscaler_{name}", {**CHAT, **labels})


def test_what_was_decided() -> None:
    registry = exported(report(Signals(asked=1, replicas=(replica(reading=reading(1.1, 2.0)),))))
    assert value(registry, "desired_replicas") == 4
    assert value(registry, "limit_replicas", limit="min") == 1
    assert value(registry, "limit_replicas", limit="max") == 9
    assert value(registry, "active") == 1
    assert value(registry, "panic") == 0
    assert value(registry, "decision_age_seconds") == 3


def test_replicas_by_state() -> None:
    replicas = (
        replica("serves", reading=reading()),
        replica("unread"),
        replica("starts", ready=False),
        replica("fits nowhere", ready=False, refused=True),
        replica("goes", ready=False, draining=True),
    )
    registry = exported(report(Signals(asked=4, replicas=replicas)))
    states = ("asked", "ready", "pending", "refused", "draining")
    assert [value(registry, "replicas", state=state) for state in states] == [4, 2, 2, 1, 1]
    assert value(registry, "signals_missing") == 1
    assert value(registry, "active") == 0


def test_demand_by_cause_and_what_it_was_measured_from() -> None:
    registry = exported(report(Signals(asked=1, replicas=(replica(reading=reading(1.1, 2.0)),))))
    assert round(value(registry, "demand_replicas") or 0, 3) == 3.1
    assert round(value(registry, "demand_cause_replicas", cause="held") or 0, 3) == 1.1
    assert round(value(registry, "demand_cause_replicas", cause="queued") or 0, 3) == 2.0
    assert value(registry, "demand_cause_replicas", cause="shed") == 0
    assert value(registry, "demand_cause_replicas", cause="waste") == 0
    assert value(registry, "kv_tokens", state="capacity") == CAPACITY
    assert round(value(registry, "kv_tokens", state="held") or 0) == round(1.1 * USABLE)
    assert round(value(registry, "kv_tokens", state="queued") or 0) == round(2.0 * USABLE)
    assert value(registry, "requests", state="running") == 100
    assert value(registry, "requests", state="queued") == 100
    assert value(registry, "tokens_per_second", kind="wasted") == 0


def test_what_is_not_known_is_absent() -> None:
    registry = exported(report(Signals(asked=1, replicas=(replica(),))))
    assert value(registry, "demand_cause_replicas", cause="prefill") is None
    assert value(registry, "prefill_tokens_per_second") is None
    assert value(registry, "startup_p90_seconds", image="cached") is None
    assert value(registry, "startup_p90_seconds", image="pulled") is None
    assert value(registry, "requests_per_second", result="admitted") is None
    assert value(registry, "kv_tokens", state="held") is None
    assert value(registry, "requests", state="running") is None


def test_what_was_learned_and_what_is_expected() -> None:
    told = lived()
    registry = exported(told)
    assert value(registry, "startup_p90_seconds", image="pulled") == 60
    assert value(registry, "horizon_seconds") == told.decision.horizon_seconds
    assert value(registry, "usable_ratio") == told.decision.history.learned.usable.share
    assert value(registry, "residence_seconds") == told.decision.history.learned.residence_seconds
    assert value(registry, "forecast_replicas") == told.decision.forecast.demand
    for method in (Method.PERSISTENCE, Method.TREND, Method.RECENT):
        expected = told.decision.forecast.values[method]
        assert value(registry, "forecast_method_replicas", method=method.name.lower()) == expected
    assert value(registry, "requests_per_second", result="refused") == 0
    assert (value(registry, "requests_per_second", result="admitted") or 0) > 0


def test_decisions_changes_and_reversals_are_counted() -> None:
    counts = Counts()
    for reason, change in (
        (Reason.UP, 2),
        (Reason.STEADY, 0),
        (Reason.UP, 1),
        (Reason.DOWN, -1),
        (Reason.STEADY, 0),
        (Reason.DOWN, -1),
        (Reason.UP, 3),
    ):
        counts.note(reason, change)
    registry = exported(report(Signals(asked=0), counts))
    assert value(registry, "decisions_total", reason="Steady") == 2
    assert value(registry, "decisions_total", reason="ScaledUp") == 3
    assert value(registry, "changes_total", direction="up") == 3
    assert value(registry, "changes_total", direction="down") == 2
    assert value(registry, "reversals_total") == 2


def test_each_family_that_is_described_is_fed() -> None:
    told = lived()
    registry = exported(told)
    collector = AutoscalerCollector(lambda: (told,))
    described = {family.name for family in collector.describe()}
    assert {family.name for family in registry.collect() if family.samples} == described - {
        "kvplane_autoscaler_decisions",  # nothing was counted here
        # of prompts and promises, which this service has none of
        "kvplane_autoscaler_prefill_tokens_per_second",
        "kvplane_autoscaler_fastest_prompt_tokens_per_second",
        "kvplane_autoscaler_prompt_margin",
        "kvplane_autoscaler_answers_per_second",
    }


def test_what_becomes_of_promises_and_the_room_that_they_need() -> None:
    told = report(Signals(asked=1, replicas=(replica("r0", reading=reading(0.5)),)))
    seen = reading(0.5, at=START + 5, prompt_tokens_total=5000.0, kept_total=90.0, broken_total=10.0)
    before = reading(0.5, prompt_tokens_total=0.0, kept_total=0.0, broken_total=0.0)
    room = restored({0: Answers(80, 20), 10: Answers(100, 0)}, fastest=500.0)
    history = fresh(TUNING)
    history = replace(
        history,
        decided_at=START,
        learned=replace(history.learned, room=room),
        meters={"r0": Meter(before)},
    )
    signals = Signals(asked=1, replicas=(replica("r0", reading=seen),))
    registry = exported(replace(told, signals=signals, decision=decide(signals, history, SETTINGS, START + 5)))
    assert value(registry, "answers_per_second", promises="kept") == 18
    assert value(registry, "answers_per_second", promises="broken") == 2
    assert value(registry, "fastest_prompt_tokens_per_second") == 1000
    assert (value(registry, "prompt_margin") or 0) > 1


def test_without_services_there_are_no_series() -> None:
    registry = CollectorRegistry()
    registry.register(AutoscalerCollector(tuple))
    assert [sample for family in registry.collect() for sample in family.samples] == []
