"""What a sidecar says becomes a reading, or is missing: never a guess."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane_api.wire import AdmissionState, EngineSignals, PromisesState, SidecarState, ThrashState
from kvplane_operator.autoscaler.signals import Reading, Replica, Signals, read

ENGINE = EngineSignals(
    kv_cache_usage_ratio=0.5,
    kv_cache_capacity_tokens=1000,
    requests_running=4,
    requests_waiting=1,
    prompt_tokens_total=70,
    prefix_hits_tokens_total=20,
    generation_tokens_total=30,
)
ADMISSION = AdmissionState(
    policy="Enforce",
    running=5,
    queued=2,
    queued_prompt_tokens=40,
    queued_reservation_tokens=60,
    reserved_tokens=650,
    kappa=1.1,
    admitted_total=9,
    refused_total=3,
    shed_reservation_tokens_total=90,
)


def state(
    *, engine: dict[str, Any] | None = None, admission: dict[str, Any] | None = None, **fields: Any
) -> SidecarState:
    """Of pod a; sound, but for these fields, which are put in without validation: a sidecar may lie."""
    usual = {"pod": "a", "served_name": "m", "engine_ready": True, "draining": False, "in_flight": 7}
    parts = {
        "signal_age_seconds": 0.5,
        "promises": PromisesState(kept_total=8, broken_total=2),
        "engine": ENGINE.model_copy(update=engine or {}),
        "admission": ADMISSION.model_copy(update=admission or {}),
    }
    return SidecarState.model_construct(**{"thrash": ThrashState(), **usual, **parts, **fields})


def test_a_reading_is_what_the_sidecar_said() -> None:
    assert read(state(), pod="a", at=12.0) == Reading(
        at=12.0,
        capacity_tokens=1000.0,
        held_tokens=650.0,  # the expected peak, more than the 500 in use
        queued_tokens=60.0,
        queued_prompt_tokens=40.0,
        kappa=1.1,
        running=4.0,
        queued=3.0,
        admitted_total=9.0,
        refused_total=3.0,
        shed_tokens_total=90.0,
        prompt_tokens_total=70.0,
        prefix_hits_tokens_total=20.0,
        generation_tokens_total=30.0,
        kept_total=8.0,
        broken_total=2.0,
    )


@pytest.mark.parametrize("admission", [None, ADMISSION.model_copy(update={"policy": "Off"})])
def test_promises_are_judged_without_admission_too(admission: AdmissionState | None) -> None:
    got = read(state().model_copy(update={"admission": admission}), pod="a", at=0.0)
    assert got is not None
    assert (got.kept_total, got.broken_total) == (8.0, 2.0)


@pytest.mark.parametrize("told", [None, PromisesState.model_construct(kept_total=math.nan, broken_total=-1)])
def test_promises_that_nobody_judged_or_that_cannot_be_are_not_known(told: PromisesState | None) -> None:
    got = read(state(promises=told), pod="a", at=0.0)
    assert got is not None
    assert (got.kept_total, got.broken_total) == (None, None)


def test_kv_in_use_counts_where_it_is_more_than_what_is_reserved() -> None:
    """After a restart the sidecar knows nothing of what the engine still holds."""
    got = read(state(admission={"reserved_tokens": 0}), pod="a", at=0.0)
    assert got is not None
    assert got.held_tokens == 500.0


@pytest.mark.parametrize(
    "told", [state().model_copy(update={"admission": None}), state(admission={"policy": "Off", "kappa": 0})]
)
def test_without_admission_those_that_wait_in_the_engine_need_as_much_as_those_that_run(told: SidecarState) -> None:
    got = read(told, pod="a", at=0.0)
    assert got is not None
    assert (got.held_tokens, got.queued_tokens, got.kappa) == (500.0, 125.0, 1.0)
    assert (got.admitted_total, got.refused_total, got.shed_tokens_total) == (None, None, None)


WAITING = {"waiting_prompt_tokens": 70, "waiting_kv_tokens": 300}


def test_what_waits_inside_a_ring_counts_with_the_kv_that_it_will_need() -> None:
    got = read(state(engine=WAITING), pod="a", at=0.0)
    assert got is not None
    assert (got.held_tokens, got.queued_tokens) == (800.0, 60.0)
    assert (got.waiting_prompt_tokens, got.queued_prompt_tokens) == (70.0, 40.0)


def test_what_the_sidecar_let_in_counts_once() -> None:
    """Its expected peak has what is parked in the ring in it."""
    got = read(state(engine=WAITING, admission={"reserved_tokens": 900}), pod="a", at=0.0)
    assert got is not None
    assert got.held_tokens == 900.0


@pytest.mark.parametrize(("told", "held"), [(0, 500.0), (300, 800.0)])
def test_without_admission_nothing_is_guessed_of_what_a_ring_tells(told: int, held: float) -> None:
    off = state(
        engine={"waiting_prompt_tokens": 70, "waiting_kv_tokens": told}, admission={"policy": "Off", "kappa": 0}
    )
    got = read(off, pod="a", at=0.0)
    assert got is not None
    assert (got.held_tokens, got.queued_tokens, got.waiting_prompt_tokens) == (held, 0.0, 70.0)


def test_waste_counts_while_the_engine_thrashes() -> None:
    wasted = {"wasted_tokens_per_second": 7.0}
    calm = read(state(thrash=ThrashState(kind=None, **wasted)), pod="a", at=0.0)
    thrashing = read(state(thrash=ThrashState(kind="preemption", **wasted)), pod="a", at=0.0)
    assert calm is not None
    assert thrashing is not None
    assert (calm.wasted_tokens_per_second, thrashing.wasted_tokens_per_second) == (0.0, 7.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"pod": "b"},
        {"signal_age_seconds": None},
        {"signal_age_seconds": 60.0},
        {"signal_age_seconds": -1.0},
        {"signal_age_seconds": math.nan},
        {"engine": {"kv_cache_usage_ratio": None}},
        {"engine": {"kv_cache_usage_ratio": math.nan}},
        {"engine": {"kv_cache_usage_ratio": math.inf}},
        {"engine": {"kv_cache_usage_ratio": -0.1}},
        {"engine": {"kv_cache_usage_ratio": 50.0}},  # percent
        {"engine": {"kv_cache_capacity_tokens": None}},
        {"engine": {"kv_cache_capacity_tokens": 0}},
        {"engine": {"kv_cache_capacity_tokens": -5}},
        {"engine": {"requests_running": None}},
        {"engine": {"requests_waiting": -3}},
        {"admission": {"reserved_tokens": -1}},
        {"admission": {"queued_reservation_tokens": 10**15}},
        {"admission": {"queued_prompt_tokens": -1}},
        {"admission": {"queued": -1}},
        {"admission": {"kappa": math.nan}},
        {"admission": {"kappa": 0.0}},
    ],
)
def test_what_is_unsound_is_missing(fields: dict[str, Any]) -> None:
    assert read(state(**fields), pod="a", at=0.0) is None


def test_no_state_is_missing() -> None:
    assert read(None, pod="a", at=0.0) is None


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"admission": {"admitted_total": -1}}, "admitted_total"),
        ({"admission": {"refused_total": 10**18}}, "refused_total"),
        ({"admission": {"shed_reservation_tokens_total": -1}}, "shed_tokens_total"),
        ({"engine": {"prompt_tokens_total": -1}}, "prompt_tokens_total"),
        ({"engine": {"generation_tokens_total": None}}, "generation_tokens_total"),
    ],
)
def test_an_unsound_counter_is_not_known(fields: dict[str, Any], name: str) -> None:
    got = read(state(**fields), pod="a", at=0.0)
    assert got is not None
    assert getattr(got, name) is None


numbers = st.none() | st.floats() | st.integers(-(10**20), 10**20)


@given(
    engine=st.fixed_dictionaries(dict.fromkeys(EngineSignals.model_fields, numbers)),
    admission=st.fixed_dictionaries({name: numbers for name in AdmissionState.model_fields if name != "policy"}),
    wasted=numbers,
    age=numbers,
)
def test_a_reading_has_only_sound_figures(
    engine: dict[str, Any], admission: dict[str, Any], wasted: Any, age: Any
) -> None:
    thrash = ThrashState.model_construct(kind="prefix", wasted_tokens_per_second=wasted)
    got = read(state(engine=engine, admission=admission, thrash=thrash, signal_age_seconds=age), pod="a", at=0.0)
    if got is not None:
        figures = [getattr(got, name) for name in Reading.__slots__]
        assert all(figure is None or (math.isfinite(figure) and figure >= 0) for figure in figures)
        assert got.capacity_tokens > 0
        assert got.kappa > 0


def test_replicas_that_drain_neither_serve_nor_come() -> None:
    replicas = (
        Replica(name="serves", created_at=0.0, ready=True),
        Replica(name="comes", created_at=0.0, ready=False),
        Replica(name="goes", created_at=0.0, ready=True, draining=True),
    )
    signals = Signals(asked=2, replicas=replicas)
    assert [each.name for each in signals.ready] == ["serves"]
    assert [each.name for each in signals.pending] == ["comes"]
    assert signals.unread == ("serves",)
