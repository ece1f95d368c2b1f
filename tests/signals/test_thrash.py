"""When the detector speaks, window by window. bench/thrash judges it on whole loads."""

from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane_api.wire import ThrashState
from kvplane_runtime.signals.thrash import (
    CLEARING_WINDOWS,
    KIND_VOTES,
    KINDS,
    VOTES,
    VOTING_WINDOWS,
    WINDOW_SECONDS,
    Sample,
    ThrashDetector,
)

START = Sample(
    usage=0.5,
    kv_blocks=1000,
    preemptions_total=0,
    evictions_total=0,
    stored_blocks_total=0,
    restored_blocks_total=0,
    restored_tokens_total=0,
    reloaded_tokens_total=0,
    wasted_tokens_total=0,
    preempted_tokens_total=0,
    prompt_tokens_total=0,
    generation_tokens_total=0,
    prefix_queries_tokens_total=0,
    prefix_hits_tokens_total=0,
)


@dataclass
class Engine:
    """Scraped once a second by a detector."""

    detector: ThrashDetector = field(default_factory=ThrashDetector)
    sample: Sample = START
    now: float = 0.0

    def __post_init__(self) -> None:
        self.detector.observe(self.sample, self.now)

    def window(
        self,
        *,
        computed: int = 10_000,
        wasted: int = 0,
        restored: int = 0,
        evicted: int = 0,
        hits: int = 0,
        preempted: int = 0,
        lost: int = 0,
        reloaded: int = 0,
        usage: float | None = 0.5,
    ) -> ThrashState:
        """Ten seconds of it; ``computed``, ``wasted`` and ``lost`` (by preemptions) are tokens, ``restored`` blocks of 16."""
        before = self.sample
        for tenth in range(1, 11):
            self.now += WINDOW_SECONDS / 10

            def grown(name: str, by: float, part: float = tenth / 10) -> float:
                return getattr(before, name) + by * part

            self.sample = replace(
                before,
                usage=usage,
                preemptions_total=grown("preemptions_total", preempted),
                preempted_tokens_total=grown("preempted_tokens_total", lost),
                evictions_total=grown("evictions_total", evicted),
                stored_blocks_total=grown("stored_blocks_total", computed / 16),
                restored_blocks_total=grown("restored_blocks_total", restored),
                restored_tokens_total=grown("restored_tokens_total", 16 * restored),
                reloaded_tokens_total=grown("reloaded_tokens_total", reloaded),
                wasted_tokens_total=grown("wasted_tokens_total", wasted),
                prompt_tokens_total=grown("prompt_tokens_total", computed - wasted + hits),
                prefix_queries_tokens_total=grown("prefix_queries_tokens_total", computed - wasted + hits),
                prefix_hits_tokens_total=grown("prefix_hits_tokens_total", hits),
            )
            self.detector.observe(self.sample, self.now)
        return self.detector.state


@pytest.fixture
def engine() -> Engine:
    return Engine()


def test_three_wasteful_windows_raise_the_alarm(engine: Engine) -> None:
    kinds = [engine.window(wasted=1000, restored=62, evicted=100).kind for _ in range(VOTES)]
    assert kinds == [None] * (VOTES - 1) + ["prefix"]


def test_three_of_five_are_enough_and_two_are_not(engine: Engine) -> None:
    for _ in range(3):
        for waste in (1000, 0, 0, 1000, 0):
            assert engine.window(wasted=waste).kind is None
    assert VOTING_WINDOWS == 5
    for waste, kind in ((1000, None), (1000, "prefix")):
        assert engine.window(wasted=waste).kind == kind


def test_it_clears_after_a_minute_below_half(engine: Engine) -> None:
    for _ in range(VOTES):
        engine.window(wasted=1000)
    for _ in range(20):
        assert engine.window(wasted=300).kind == "prefix"  # 3 %: more than half
    kinds = [engine.window(wasted=200).kind for _ in range(CLEARING_WINDOWS)]
    assert kinds == ["prefix"] * (CLEARING_WINDOWS - 1) + [None]


def test_an_engine_that_falls_silent_clears_too(engine: Engine) -> None:
    for _ in range(VOTES):
        engine.window(wasted=1000)
    for _ in range(CLEARING_WINDOWS):
        state = engine.window(computed=0)
    assert state == ThrashState(kind=None, wasted_tokens_per_second=0.0)


@pytest.mark.parametrize(
    ("window", "kind"),
    [
        ({"usage": 0.97, "preempted": 5}, "preemption"),
        ({"usage": 0.97}, "preemption"),
        ({"usage": 0.92, "preempted": 5}, "preemption"),
        ({"usage": 0.92}, "prefix"),
        ({"usage": 0.5, "preempted": 5}, "prefix"),
        ({"usage": 0.5, "preempted": 5, "lost": 400}, "prefix"),
        ({"usage": 0.5, "preempted": 5, "lost": 600}, "preemption"),
        ({"usage": None, "preempted": 5}, "preemption"),
        ({"usage": 0.5, "restored": 100, "reloaded": 900}, "offload"),
        ({"usage": 0.5, "restored": 100, "reloaded": 700}, "prefix"),
    ],
)
def test_the_kind_says_what_is_thrown_away(engine: Engine, window: dict[str, float], kind: str) -> None:
    for _ in range(VOTES):
        engine.window(wasted=1000, **window)  # type: ignore[arg-type]
    assert engine.detector.state.kind == kind


PREEMPTING, RESTORING = {"usage": 0.97, "preempted": 5}, {"usage": 0.8}


def test_one_episode_has_one_kind(engine: Engine) -> None:
    """The memory is full in most windows, and in some there is only what its preemptions left behind."""
    kinds = [engine.window(wasted=1000, **window).kind for window in 6 * [PREEMPTING, RESTORING, PREEMPTING]]  # type: ignore[arg-type]
    assert set(kinds[VOTES - 1 :]) == {"preemption"}


def test_the_kind_follows_a_cause_that_stays(engine: Engine) -> None:
    for _ in range(KIND_VOTES):
        engine.window(wasted=1000, **PREEMPTING)  # type: ignore[arg-type]
    kinds = [engine.window(wasted=1000, **RESTORING).kind for _ in range(KIND_VOTES)]  # type: ignore[arg-type]
    assert kinds == ["preemption"] * 6 + ["prefix"] * 6


def test_a_moderate_waste_counts_when_the_cache_shows_it_too(engine: Engine) -> None:
    """3 % wasted: alone too little, but not together with evictions above and hits below what they were."""
    for _ in range(6):
        engine.window(hits=8000, evicted=10)
    for _ in range(6):
        assert engine.window(wasted=300, hits=8000, evicted=10).kind is None
    for _ in range(6):
        assert engine.window(wasted=300, hits=8000, evicted=300).kind is None
    for _ in range(2):
        assert engine.window(wasted=300, hits=1000, evicted=300).kind is None
    for _ in range(6):
        engine.window(wasted=300, hits=1000, evicted=300)
    assert engine.detector.state.kind == "prefix"


def test_restored_blocks_count_where_tokens_are_moved_not_computed(engine: Engine) -> None:
    """Offloading: nothing is computed again, so only R shows it."""
    for _ in range(6):
        engine.window(hits=8000)
    for _ in range(8):
        engine.window(restored=300, reloaded=4800, evicted=300, hits=1000)
    assert engine.detector.state == ThrashState(kind="offload", wasted_tokens_per_second=0.0)


@pytest.mark.parametrize(
    "window",
    [
        {"evicted": 600},
        {"evicted": 600, "usage": 0.99},
        {"hits": 0},
        {"wasted": 190, "restored": 12, "evicted": 600},
        {"preempted": 3, "usage": 0.99},
    ],
    ids=["churn without repeats", "the same, full", "no hits any more", "a little waste", "cheap preemptions"],
)
def test_it_is_silent_where_little_or_nothing_is_computed_twice(engine: Engine, window: dict[str, float]) -> None:
    for _ in range(10):
        engine.window(hits=8000)
    for _ in range(30):
        assert engine.window(**window).kind is None  # type: ignore[arg-type]


def test_a_cold_start_is_silent(engine: Engine) -> None:
    for evicted in (0, 0, 0, 100, 600, 600, 600, 600):
        assert engine.window(evicted=evicted).kind is None


def test_a_restarted_engine_starts_from_nothing(engine: Engine) -> None:
    for _ in range(VOTES):
        engine.window(wasted=1000)
    engine.sample = replace(START, wasted_tokens_total=engine.sample.wasted_tokens_total)
    engine.now += 60
    assert engine.detector.observe(engine.sample, engine.now).kind is None
    assert [engine.window(wasted=1000).kind for _ in range(VOTES)][:-1] == [None] * (VOTES - 1)


def test_severity_is_wasted_tokens_per_second_of_a_minute(engine: Engine) -> None:
    assert engine.detector.state.wasted_tokens_per_second is None
    assert engine.window(wasted=1000).wasted_tokens_per_second == pytest.approx(100)
    for _ in range(5):
        engine.window()
    assert engine.detector.state.wasted_tokens_per_second == pytest.approx(1000 / 60)
    assert engine.window().wasted_tokens_per_second == 0


def test_what_is_unknown_never_votes() -> None:
    detector = ThrashDetector()
    for second in range(200):
        state = detector.observe(Sample(usage=1.0, evictions_total=100.0 * second), float(second))
    assert state == ThrashState()


def test_a_missed_scrape_stretches_the_window(engine: Engine) -> None:
    engine.now += 4 * WINDOW_SECONDS
    engine.sample = replace(engine.sample, wasted_tokens_total=400)
    assert engine.detector.observe(engine.sample, engine.now).wasted_tokens_per_second == pytest.approx(10)


def test_the_kinds_are_those_of_the_wire() -> None:
    for kind in KINDS:
        assert ThrashState(kind=kind).kind == kind


@given(
    st.lists(
        st.tuples(st.floats(0.1, 100), st.lists(st.none() | st.floats(0, 1e9), min_size=12, max_size=12)), max_size=60
    )
)
def test_any_samples_are_taken(samples: list[tuple[float, list[float | None]]]) -> None:
    """Counters that jump, go back, come and go."""
    detector, now = ThrashDetector(), 0.0
    names = [name for name in START.__dataclass_fields__ if name.endswith("_total")]
    states = []
    for seconds, values in samples:
        now += seconds
        sample = Sample(usage=0.5, kv_blocks=10, **dict(zip(names, values, strict=True)))  # type: ignore[arg-type]
        states.append(detector.observe(sample, now))
    for before, after in pairwise(states):
        assert after.kind in (None, *KINDS)
        if after.kind is not None and before.kind is None:
            assert after.wasted_tokens_per_second is None or after.wasted_tokens_per_second >= 0
