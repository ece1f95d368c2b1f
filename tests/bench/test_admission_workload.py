"""The traffic of the admission benchmark: same seed, same requests; rates, bursts and lengths as they are described."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.admission import workload
from bench.admission.workload import CEILINGS, CHAT, LONG, MIXED, MIXES, SHIFT, Phase

CAPACITY = {"chat": 8.0, "mixed": 4.0, "long": 3.0, SHIFT: 0.9}


@pytest.mark.parametrize("mix", MIXES)
def test_the_same_seed_gives_the_same_requests_and_another_gives_others(mix: str) -> None:
    def drawn(seed: int) -> list[workload.Arrival]:
        phases = workload.phases(mix, load=1.6, seconds=30, capacity=CAPACITY, seed=seed)
        return workload.arrivals(phases, seed=seed)

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


@given(
    mix=st.sampled_from(MIXES),
    load=st.floats(0.5, 3.0),
    seconds=st.floats(5.0, 60.0),
    seed=st.integers(0, 1000),
)
def test_requests_are_in_order_in_time_and_within_what_the_engine_takes(
    mix: str, load: float, seconds: float, seed: int
) -> None:
    phases = workload.phases(mix, load=load, seconds=seconds, capacity=CAPACITY, seed=seed)
    arrivals = workload.arrivals(phases, seed=seed)
    assert [arrival.at for arrival in arrivals] == sorted(arrival.at for arrival in arrivals)
    for arrival in arrivals:
        assert 0 <= arrival.at <= seconds
        assert 1 <= arrival.output_tokens <= arrival.max_tokens
        assert arrival.max_tokens in CEILINGS
        assert arrival.prompt_tokens + arrival.max_tokens <= 2048


def test_the_rate_is_the_load_times_the_capacity_bursts_included() -> None:
    phases = workload.phases("chat", load=1.5, seconds=2000, capacity=CAPACITY, seed=0)
    assert len(workload.arrivals(phases, seed=7)) / 2000 == pytest.approx(12.0, rel=0.03)


def test_one_second_of_ten_comes_at_once() -> None:
    arrivals = workload.arrivals([Phase(0.0, 10.0, CHAT, 20.0)], seed=3)
    most = max(sum(a.at <= b.at <= a.at + workload.BURST_SECONDS for b in arrivals) for a in arrivals)
    assert most >= 20


def test_lengths_have_the_medians_of_their_mix() -> None:
    arrivals = workload.one_by_one("mixed", count=4000, seed=1)
    assert statistics.median(a.prompt_tokens for a in arrivals) == pytest.approx(MIXED.prompt.median, rel=0.1)
    assert statistics.median(a.output_tokens for a in arrivals) == pytest.approx(MIXED.output.median, rel=0.1)


def test_what_clients_announce_says_next_to_nothing_about_the_answer() -> None:
    arrivals = workload.one_by_one("mixed", count=4000, seed=2)
    short = [a for a in arrivals if a.output_tokens <= CEILINGS[0]]
    assert abs(statistics.correlation([a.output_tokens for a in short], [a.max_tokens for a in short])) < 0.05


def test_a_shift_changes_the_mix_every_twenty_seconds_and_the_window_begins_amid_one() -> None:
    phases = workload.phases(SHIFT, load=2.0, seconds=50, capacity=CAPACITY, seed=1)
    assert [(phase.begin, phase.end, phase.mix) for phase in phases] == [
        (0.0, 10.0, MIXED),
        (10.0, 30.0, LONG),
        (30.0, 50.0, CHAT),
    ]
    assert [phase.rate for phase in phases] == pytest.approx([2 * 0.9 * 4, 2 * 0.9 * 3, 2 * 0.9 * 8])


def test_requests_one_by_one_of_a_shift_take_the_mixes_in_turn() -> None:
    drawn = workload.one_by_one(SHIFT, count=300, seed=0)
    assert statistics.median(a.prompt_tokens for a in drawn[2::3]) > 4 * statistics.median(
        a.prompt_tokens for a in drawn[0::3]
    )
