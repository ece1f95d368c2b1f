"""What goes out of evictions, waste and thrashing, from which source."""

from pathlib import Path

import pytest

from kvplane_api.wire import ThrashState
from kvplane_runtime.signals.ledger import Batch, BlocksRemoved, BlocksStored, Event
from tests.sidecar.test_metrics import Sidecar

EXPOSITION = """\
vllm:cache_config_info{block_size="16",num_gpu_blocks="101"} 1
vllm:kv_cache_usage_perc USAGE
vllm:num_requests_running 4
vllm:num_preemptions_total PREEMPTIONS
vllm:prompt_tokens_total 1000
vllm:generation_tokens_total 100
"""
SAMPLED = """\
vllm:kv_block_lifetime_seconds_bucket{le="+Inf"} EVICTED
vllm:kv_block_lifetime_seconds_sum 9
"""
FAMILIES = {
    "kvplane_kv_block_evictions",
    "kvplane_wasted_tokens",
    "kvplane_preempted_tokens",
    "kvplane_thrashing",
    "kvplane_kv_cache_tail_waste_tokens",
    "kvplane_kv_event_batches",
    "kvplane_kv_events_passed_over",
}


class Engine:
    """Scrapes and KV events of an engine beside the sidecar."""

    def __init__(self, sidecar: Sidecar) -> None:
        self.sidecar = sidecar
        self.sequence = 0
        sidecar.engine.kv.contexts = lambda: [100, 60, 40, 20]

    def scrape(self, *, preemptions: int = 0, usage: float = 0.5, more: str = "") -> None:
        self.sidecar.clock.pass_seconds(1)
        text = EXPOSITION.replace("PREEMPTIONS", str(preemptions)).replace("USAGE", str(usage))
        self.sidecar.feed(text + more)

    def publish(self, *events: Event) -> None:
        batch = Batch(sequence=self.sequence, timestamp=float(self.sequence), events=events)
        self.sidecar.engine.kv.ledger.apply(batch, self.sidecar.clock())
        self.sequence += 1


@pytest.fixture
def sidecar(tmp_path: Path) -> Sidecar:
    return Sidecar(tmp_path)


@pytest.fixture
def engine(sidecar: Sidecar) -> Engine:
    return Engine(sidecar)


def evictions(sidecar: Sidecar) -> dict[str, float]:
    values = {
        source: sidecar.value("kvplane_kv_block_evictions_total", source=source)
        for source in ("exact", "sampled", "estimated")
    }
    return {source: value for source, value in values.items() if value is not None}


def wasted(sidecar: Sidecar) -> dict[str, float]:
    values = {source: sidecar.value("kvplane_wasted_tokens_total", source=source) for source in ("exact", "estimated")}
    return {source: value for source, value in values.items() if value is not None}


def test_nothing_known_is_nothing_exported(sidecar: Sidecar) -> None:
    assert not sidecar.families() & FAMILIES


def test_kv_events_are_exact(sidecar: Sidecar, engine: Engine) -> None:
    engine.publish(BlocksStored(tuple(range(80)), 16))
    engine.scrape()
    assert (evictions(sidecar), wasted(sidecar)) == ({"exact": 0}, {"exact": 0})
    engine.publish(BlocksRemoved((1, 2, 3)), BlocksStored((1,), 16))
    engine.scrape(preemptions=1)
    assert (evictions(sidecar), wasted(sidecar)) == ({"exact": 3}, {"exact": 16})
    assert sidecar.value("kvplane_preempted_tokens_total") == 20
    assert sidecar.value("kvplane_kv_event_batches_total", result="applied") == 2


def test_cached_blocks_are_told_from_free_ones(sidecar: Sidecar, engine: Engine) -> None:
    engine.scrape()
    assert sidecar.value("kvplane_kv_cache_blocks", state="free") == 50
    assert sidecar.value("kvplane_kv_cache_blocks", state="cached") is None
    engine.publish(BlocksStored(tuple(range(80)), 16))
    engine.scrape()
    states = [sidecar.value("kvplane_kv_cache_blocks", state=state) for state in ("used", "cached", "free")]
    assert states == [50, 80 - (50 - 4), 100 - 50 - 34]


def test_a_sample_stands_in_for_events(sidecar: Sidecar, engine: Engine) -> None:
    engine.scrape(more=SAMPLED.replace("EVICTED", "4"))
    engine.scrape(more=SAMPLED.replace("EVICTED", "9"))
    assert evictions(sidecar) == {"sampled": 500}


def test_preemptions_stand_in_for_both(sidecar: Sidecar, engine: Engine) -> None:
    engine.scrape()
    assert (evictions(sidecar), wasted(sidecar)) == ({"estimated": 0}, {"estimated": 0})
    engine.scrape(preemptions=1)
    assert (evictions(sidecar), wasted(sidecar)) == ({"estimated": 2}, {"estimated": 20})
    assert sidecar.value("kvplane_preempted_tokens_total") == 20


def test_the_tail_waste_is_that_of_the_last_blocks(sidecar: Sidecar, engine: Engine) -> None:
    engine.scrape()
    assert sidecar.value("kvplane_kv_cache_tail_waste_tokens") == 12 + 4 + 8 + 12


def test_what_was_lost_or_passed_over_is_counted(sidecar: Sidecar, engine: Engine) -> None:
    ledger = sidecar.engine.kv.ledger
    engine.sequence = 3
    engine.publish(BlocksStored((1,), 16))
    ledger.unreadable_total, ledger.untracked_total = 4, 5
    assert sidecar.value("kvplane_kv_event_batches_total", result="lost") == 3
    assert sidecar.value("kvplane_kv_events_passed_over_total", reason="unreadable") == 4
    assert sidecar.value("kvplane_kv_events_passed_over_total", reason="untracked") == 5


def test_the_age_of_the_events_is_since_their_sockets_answered(sidecar: Sidecar) -> None:
    assert sidecar.value("kvplane_signal_age_seconds", signal="kv_events") is None
    sidecar.engine.kv.ledger.heard(sidecar.clock())
    sidecar.clock.pass_seconds(7)
    assert sidecar.value("kvplane_signal_age_seconds", signal="kv_events") == 7


def test_thrashing_is_one_kind_at_a_time(sidecar: Sidecar, engine: Engine) -> None:
    engine.scrape()
    kinds = ("preemption", "prefix", "offload")
    assert [sidecar.value("kvplane_thrashing", kind=kind) for kind in kinds] == [0, 0, 0]
    sidecar.engine.kv.thrash = ThrashState(kind="prefix", wasted_tokens_per_second=5.0)
    assert [sidecar.value("kvplane_thrashing", kind=kind) for kind in kinds] == [0, 1, 0]


def test_a_full_engine_that_preempts_again_and_again_thrashes(sidecar: Sidecar, engine: Engine) -> None:
    for second in range(60):
        engine.scrape(preemptions=second, usage=0.97)
    assert sidecar.value("kvplane_thrashing", kind="preemption") == 1


def test_a_restarted_engine_begins_with_an_empty_ledger(sidecar: Sidecar, engine: Engine) -> None:
    engine.publish(BlocksStored(tuple(range(80)), 16))
    engine.scrape()
    sidecar.engine.kv.restarted()
    engine.scrape()
    assert sidecar.value("kvplane_kv_cache_blocks", state="cached") == 0
    assert evictions(sidecar) == {"exact": 0}
