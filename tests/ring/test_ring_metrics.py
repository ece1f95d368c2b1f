"""What a scrape shows: vLLM's words for what every engine has, as the sidecar reads them, and the ring's own."""

from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kvplane_runtime.ring.metrics import METRICS, RingCollector, Tally
from kvplane_runtime.ring.requests import Accepted
from kvplane_runtime.ring.state import State
from kvplane_runtime.sidecar.signals import normalise
from tests.ring.fake_engine import STATE
from tests.ring.simulated import Ring, prompt


def exposition(state: State = STATE, tally: Tally | None = None) -> str:
    registry = CollectorRegistry()
    registry.register(RingCollector(state=lambda: state, tally=tally or Tally(), in_flight=lambda: 2))
    return generate_latest(registry).decode()


def samples(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (
            sample.name,
            tuple(value for name, value in sorted(sample.labels.items()) if name != "model_name"),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_sidecar_reads_it_as_a_paged_engine() -> None:
    tally = Tally()
    tally.token(since_arrival=0.3, since_last=None)
    tally.token(since_arrival=0.4, since_last=0.1)
    tally.completed(seconds=0.4, prompt_tokens=10, generated_tokens=2)
    scrape = normalise(exposition(tally=tally))
    assert scrape.values["kv_cache_usage_ratio"] == 0.5
    assert scrape.values["requests_running"] == 3
    assert scrape.values["requests_waiting"] == 2
    assert scrape.values["preemptions"] == 0
    assert scrape.kv_cache is not None
    assert scrape.kv_cache.capacity_tokens == 400
    assert scrape.histograms["time_to_first_token_seconds"].sum == 0.3
    assert scrape.histograms["inter_token_latency_seconds"].count == 1
    assert scrape.histograms["e2e_request_latency_seconds"].count == 1


@pytest.mark.parametrize(
    ("limit", "reserved", "told"),
    [(80, 50, (320, 0.625)), (80, 80, (320, 1.0)), (80, 90, (320, 1.0)), (0, 50, (400, 0.5))],
)
def test_what_is_kept_free_for_a_lost_rank_is_no_room(limit: int, reserved: int, told: tuple[int, float]) -> None:
    """A ring that refuses for want of room is full to whoever reads it, also after a loss; one that has no room is still read."""
    scheduler = replace(STATE.scheduler, limit_tokens=limit, active=(20, 20, 20, reserved))
    scrape = normalise(exposition(replace(STATE, scheduler=scheduler)))
    assert scrape.kv_cache is not None
    assert (scrape.kv_cache.capacity_tokens, scrape.values["kv_cache_usage_ratio"]) == (told[0], pytest.approx(told[1]))


def test_prompt_tokens_count_when_they_are_computed() -> None:
    """A rate of what is admitted would be that of minutes of work in one scrape."""
    done = {"prompt_tokens": 1000, "cached_tokens": 200, "computed_tokens": 350, "refilled_tokens": 50}
    scheduler = replace(STATE.scheduler, counts={**STATE.scheduler.counts, **done})
    scrape = normalise(exposition(replace(STATE, scheduler=scheduler)))
    assert scrape.values["prompt_tokens"] == 500
    assert (scrape.values["prefix_cache_queries_tokens"], scrape.values["prefix_cache_hits_tokens"]) == (1000, 200)


def test_what_waits_is_told_and_what_is_under_way_is_not() -> None:
    ring = Ring()

    def told() -> tuple[float, float]:
        known = samples(exposition(replace(STATE, scheduler=ring.scheduler.snapshot())))
        return known["kvplane_ring_waiting_prompt_tokens", ()], known["kvplane_ring_waiting_kv_tokens", ()]

    ring.submit("first", prompt(200))
    assert told() == (200, 0)
    ring.step()
    assert told() == (0, 0)
    ring.submit("second", prompt(300, 1), outputs=3)
    assert told() == (300, 0), "three outputs have one prompt, and their KV is reserved"
    ring.drain()
    assert ring.submit("again", prompt(200)) == Accepted("again", 199, 4)
    assert told() == (1, 0), "what is cached is not computed again"


def test_what_is_parked_is_told_with_all_that_it_will_need() -> None:
    """1200 tokens, and 49 of the output that are inputs: what is not held is needed, and of the first 1200 to be computed."""
    ring = Ring(ranks=2, capacity=1000)
    ring.submit("large", prompt(1200), max_tokens=50)
    while not ring.tokens("large"):
        ring.step()
    ring.reform({0: 0}, 1)
    known = ring.scheduler.snapshot()
    (held,) = known.active
    assert 500 < held < 700
    assert (known.parked, known.waiting_prompt_tokens, known.waiting_kv_tokens) == (1, 1200 - held, 1249 - held)
    ring.reform({0: 0}, 2)
    known = ring.scheduler.snapshot()
    assert (known.parked, known.waiting_prompt_tokens, known.waiting_kv_tokens) == (0, 0, 0)


def test_the_rings_own() -> None:
    known = samples(exposition())
    assert known["kvplane_ring_epoch", ()] == 3
    assert known["kvplane_ring_members", ()] == 4
    assert known["kvplane_ring_kv_tokens", ("2", "held")] == 30
    assert known["kvplane_ring_kv_tokens", ("3", "reserved")] == 50
    assert known["kvplane_ring_reforms_total", ("lost",)] == 1
    assert known["kvplane_ring_recovery_seconds_sum", ()] == 1.2
    assert known["kvplane_ring_step_seconds_total", ("waited", "0")] == 0.25
    assert known["kvplane_ring_sent_bytes_total", ("1",)] == 1000
    assert known["kvplane_ring_exposed_wait_ratio", ()] == 0.125
    assert known["kvplane_ring_imbalance_ratio", ()] == pytest.approx(1 / 3)
    assert known["kvplane_ring_api_requests_in_flight", ()] == 2


def test_what_is_not_known_is_absent() -> None:
    young = replace(STATE, epoch=-1, traffic=(), startup_seconds=None, formed=False, members=(), loading={1: 0.5})
    known = samples(exposition(young))
    names = {name for name, _ in known}
    assert not names & {"kvplane_ring_epoch", "kvplane_ring_exposed_wait_ratio", "kvplane_ring_startup_seconds"}
    assert known["kvplane_ring_loaded_ratio", ("1",)] == 0.5
    assert known["kvplane_ring_formed", ()] == 0


def test_every_metric_of_the_table_is_exported_and_no_other() -> None:
    tally = Tally()
    tally.responses[200] = 1
    text = exposition(replace(STATE, loading={1: 0.5}), tally)
    exported = {family.name for family in text_string_to_metric_families(text)}
    assert exported == {metric.name for metric in METRICS}
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert all(metric.description.endswith(".") for metric in METRICS)
