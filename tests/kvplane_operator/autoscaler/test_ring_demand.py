"""Prompts that wait inside a ring are demand: from its registry, by what its sidecar tells, to the law."""

from dataclasses import replace
from typing import Literal

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from kvplane_api.wire import AdmissionConfig, SidecarConfig, SidecarState
from kvplane_operator.autoscaler.demand import Demand, measure
from kvplane_operator.autoscaler.learned import Learned, Usable
from kvplane_operator.autoscaler.settings import Settings
from kvplane_operator.autoscaler.signals import read
from kvplane_runtime.admission.controller import Admission
from kvplane_runtime.ring.metrics import RingCollector, Tally
from kvplane_runtime.sidecar.signals import normalise
from tests.kvplane_operator.autoscaler.world import START, signals
from tests.ring.fake_engine import STATE
from tests.ring.simulated import Ring, prompt

Policy = Literal["Enforce", "Off"]
LEARNED = Learned(usable=Usable(share=0.85), prefill_tokens_per_second=100.0)
"""So 85 prompt tokens a second are one replica, and 850 that wait."""


def demand(ring: Ring, policy: Policy = "Enforce") -> Demand:
    """Of a group whose sidecar has just started: of what is in the ring it knows only what the ring tells."""
    state = replace(STATE, scheduler=ring.scheduler.snapshot())
    registry = CollectorRegistry()
    registry.register(RingCollector(state=lambda: state, tally=Tally(), in_flight=lambda: 0))
    config = SidecarConfig(served_name="tiny", admission=AdmissionConfig(policy=policy))
    told = SidecarState(
        pod="ring-0",
        served_name="tiny",
        engine_ready=True,
        draining=False,
        in_flight=0,
        signal_age_seconds=0.0,
        engine=normalise(generate_latest(registry).decode()).wire(max_model_len_tokens=None),
        admission=Admission(config=config, uniform=lambda: 0.5, ring=True).state(now=0.0),
    )
    got = read(SidecarState.model_validate_json(told.model_dump_json(by_alias=True)), pod="ring-0", at=START)
    assert got is not None
    return measure(signals(got), {}, LEARNED, Settings(max_replicas=9))


@pytest.mark.parametrize("policy", ["Enforce", "Off"])
def test_a_prompt_that_waits_behind_another_counts(policy: Policy) -> None:
    ring = Ring()
    ring.submit("first", prompt(200))
    ring.step()
    alone = demand(ring, policy)
    assert (alone.prefill, alone.queued) == (0.0, 0.0), "what is under way waits for nobody"
    ring.submit("second", prompt(300, 1))
    both = demand(ring, policy)
    assert both.prefill == pytest.approx(300 / 850)
    assert both.held > alone.held, "its KV is reserved"
    assert both.queued == 0.0, "and nothing of it is guessed beside that"
    ring.drain()
    assert demand(ring, policy).total == 0.0


def test_prompts_that_wait_fill_no_more_groups_than_they_are() -> None:
    ring = Ring()
    ring.submit("first", prompt(200))
    ring.step()
    ring.submit("long", prompt(30_000, 1))
    assert demand(ring).prefill == 2.0


@pytest.mark.parametrize("policy", ["Enforce", "Off"])
def test_a_request_that_is_parked_counts_with_all_that_it_will_need(policy: Policy) -> None:
    """It holds a bit more than half of what is left of the ring, and needs more than all of it."""
    ring = Ring(ranks=2, capacity=1000)
    ring.submit("large", prompt(1200), max_tokens=50)
    while not ring.tokens("large"):
        ring.step()
    ring.reform({0: 0}, 1)
    assert ring.step() is None
    known, parked = ring.scheduler.snapshot(), demand(ring, policy)
    assert sum(known.active) / 850 < 0.8, "what it holds is less than a group's work"
    assert parked.held == 1.0
    assert parked.queued == 0.0
    assert parked.prefill == pytest.approx(known.waiting_prompt_tokens / 850)
    ring.reform({0: 0}, 2)
    assert demand(ring, policy).prefill == 0.0, "it goes on"
