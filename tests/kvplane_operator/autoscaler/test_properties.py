"""What holds for any signals, after any life."""

import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kvplane_operator.autoscaler.document import MOST_BYTES, dump, load
from kvplane_operator.autoscaler.forecast import AWAITED_MOST
from kvplane_operator.autoscaler.history import fresh
from kvplane_operator.autoscaler.law import Decision, decide
from kvplane_operator.autoscaler.series import BUCKETS, MINUTES, RECENT_MOST
from kvplane_operator.autoscaler.settings import Settings
from kvplane_operator.autoscaler.signals import Reading, Replica, Signals
from kvplane_operator.autoscaler.startup import SAMPLES
from tests.kvplane_operator.autoscaler.world import START, TUNING, World, reading, replica, reversals

MAXIMUM = 12


@dataclass(frozen=True)
class Work:
    """Of one replica, per second where it is a flow."""

    load: float
    queue: float
    kappa: float
    admitted: float
    refused: float
    shed_tokens: float
    prompt_tokens: float
    wasted_tokens: float
    broken: float


@dataclass(frozen=True)
class Tick:
    """What one decision sees."""

    seconds: float
    """Since the last one."""
    ready: tuple[Work | None, ...]
    """None: its signals are missing."""
    pending: int
    refused: bool
    wake: bool


works = st.builds(
    Work,
    load=st.floats(0, 1.18),
    queue=st.sampled_from([0.0, 0.0, 0.5, 3.0]) | st.floats(0, 5),
    kappa=st.sampled_from([1.0, 1.0, 0.5, 1.25]),
    admitted=st.integers(0, 50).map(float),
    refused=st.sampled_from([0.0, 0.0, 0.0, 1.0, 30.0]),
    shed_tokens=st.sampled_from([0.0, 500.0, 50_000.0]),
    prompt_tokens=st.floats(0, 1e5),
    wasted_tokens=st.sampled_from([0.0, 0.0, 0.0, 100.0]),
    broken=st.sampled_from([0.0, 0.0, 1.0, 30.0]),
)
ticks = st.builds(
    Tick,
    seconds=st.sampled_from([0.0, 1.0, 5.0, 5.0, 5.0, 30.0, 55.0, 100.0, 400.0, -5.0, -4000.0]),
    ready=st.lists(st.none() | works, max_size=4).map(tuple) | st.lists(works, max_size=4).map(tuple),
    pending=st.integers(0, 4),
    refused=st.booleans(),
    wake=st.booleans(),
)
lives = st.lists(ticks, max_size=8)
specs = st.builds(
    Settings,
    min_replicas=st.integers(1, 4),
    max_replicas=st.integers(4, MAXIMUM),
    scale_to_zero_after_seconds=st.sampled_from([None, 1, 60, 600]),
    scale_down_window_seconds=st.sampled_from([0, 60, 300]),
    cost_of_miss=st.sampled_from([0.0, 1.0, 4.0, 100.0]),
)


class Life:
    """One service from decision to decision, each carried out or not: nothing here depends on that."""

    def __init__(self, spec: Settings) -> None:
        self.spec = spec
        self.history = fresh(TUNING)
        self.now = START
        self.asked = spec.min_replicas
        self.seconds = 0.0
        """In which work was done; counters only rise."""

    def see(self, tick: Tick) -> Signals:
        self.now += tick.seconds
        self.seconds += max(0.0, tick.seconds)
        serving = tuple(
            replica(f"r{number}", reading=None if work is None else self.told(work))
            for number, work in enumerate(tick.ready)
        )
        coming = tuple(
            replica(f"p{number}", ready=False, created_at=self.now - 30, refused=tick.refused)
            for number in range(tick.pending)
        )
        return Signals(asked=self.asked, replicas=(*serving, *coming), wake=tick.wake)

    def told(self, work: Work) -> Reading:
        return reading(
            work.load,
            work.queue,
            at=self.now,
            kappa=work.kappa,
            queued_prompt_tokens=1000 * work.queue,
            admitted_total=work.admitted * self.seconds,
            refused_total=work.refused * self.seconds,
            shed_tokens_total=work.shed_tokens * self.seconds,
            prompt_tokens_total=work.prompt_tokens * self.seconds,
            generation_tokens_total=work.prompt_tokens * self.seconds,
            wasted_tokens_per_second=work.wasted_tokens,
            kept_total=work.admitted * self.seconds,
            broken_total=work.broken * self.seconds,
        )

    def decide(self, seen: Signals) -> Decision:
        """Carried out; the next signals come after it."""
        decision = decide(seen, self.history, self.spec, self.now)
        self.history, self.asked = decision.history, decision.desired
        return decision

    def live(self, life: list[Tick]) -> list[Decision]:
        return [self.decide(self.see(tick)) for tick in life]


@given(specs, lives)
def test_never_below_the_minimum_or_above_the_maximum(spec: Settings, life: list[Tick]) -> None:
    for decision in Life(spec).live(life):
        assert decision.desired <= spec.max_replicas
        slept = spec.scale_to_zero_after_seconds is not None and decision.desired == 0
        assert slept or decision.desired >= spec.min_replicas


@given(specs, lives, st.integers(0, 30))
def test_bounds_hold_for_whatever_is_asked_for_now(spec: Settings, life: list[Tick], asked: int) -> None:
    """The user's bounds were changed, or somebody else wrote the replicas."""
    lived = Life(spec)
    lived.live(life)
    lived.asked = asked
    for decision in lived.live(life[:1]):
        assert decision.desired <= spec.max_replicas
        assert decision.desired >= spec.min_replicas or decision.desired == 0


WORK = st.sampled_from(["held_tokens", "queued_tokens", "queued_prompt_tokens", "waiting_prompt_tokens"])


@given(specs, lives, ticks, st.tuples(st.integers(0, 5), WORK, st.floats(0, 20)))
def test_more_demand_never_asks_for_less(
    spec: Settings, life: list[Tick], tick: Tick, change: tuple[int, str, float]
) -> None:
    lived = Life(spec)
    lived.live(life)
    seen = lived.see(tick)
    where, name, more = change
    fuller = []
    for number, each in enumerate(seen.replicas):
        if number == where and each.reading is not None:
            amount = getattr(each.reading, name) + more * 85_000.0
            fuller.append(replace(each, reading=replace(each.reading, **{name: amount})))
        else:
            fuller.append(each)
    less = decide(seen, lived.history, spec, lived.now)
    greater = decide(replace(seen, replicas=tuple(fuller)), lived.history, spec, lived.now)
    assert greater.demand.total >= less.demand.total
    assert greater.desired >= less.desired


@given(specs, lives, ticks, st.sets(st.integers(0, 5), min_size=1))
def test_a_missing_signal_never_lowers(spec: Settings, life: list[Tick], tick: Tick, missing: set[int]) -> None:
    lived = Life(spec)
    lived.live(life)
    seen = lived.see(tick)
    blind = tuple(
        replace(each, reading=None) if number in missing else each for number, each in enumerate(seen.replicas)
    )
    decision = decide(replace(seen, replicas=blind), lived.history, spec, lived.now)
    if any(each.ready and each.reading is None for each in blind):
        assert decision.desired >= min(seen.asked, spec.max_replicas)
        assert not decision.active


@given(specs, lives, lives)
def test_after_a_restart_nothing_goes_for_one_window(spec: Settings, life: list[Tick], after: list[Tick]) -> None:
    lived = Life(spec)
    lived.live(life)
    lived.history = load(dump(lived.history), TUNING)
    begun = None
    for tick in after:
        asked = lived.asked
        decision = lived.decide(lived.see(tick))
        begun = lived.now if begun is None or lived.now < begun else begun
        if lived.now - begun < spec.scale_down_window_seconds:
            assert decision.desired >= asked


@given(specs, lives)
def test_the_same_again_is_the_same(spec: Settings, life: list[Tick]) -> None:
    one, other = Life(spec), Life(spec)
    assert one.live(life) == other.live(life)


@given(specs, lives)
def test_each_decision_is_explained_in_a_line(spec: Settings, life: list[Tick]) -> None:
    for decision in Life(spec).live(life):
        assert decision.message.endswith(".")
        assert "\n" not in decision.message
        assert len(decision.message) < 1024  # of an event


@hypothesis_settings(max_examples=15)
@given(st.floats(0.1, 9), st.integers(1, 12), st.sampled_from([20.0, 60.0, 185.0]))
def test_a_steady_load_turns_nothing_back(demand: float, replicas: int, startup: float) -> None:
    decisions = World(lambda _: demand, replicas=replicas, startup=startup).run(1800.0)
    assert reversals(decisions, first=replicas) == 0
    assert decisions[-1].desired >= demand * TUNING.usable_start / TUNING.usable_most


@hypothesis_settings(max_examples=5)
@given(st.integers(0, 2**32), st.sampled_from([1.6, 3.3, 6.5]))
def test_a_steady_load_with_noise_turns_back_at_most_once_an_hour(seed: int, level: float) -> None:
    uniform = random.Random(seed).uniform  # noqa: S311
    world = World(lambda _: level * uniform(0.95, 1.05))
    world.run(600.0)
    first = len(world.created)
    assert reversals(world.run(3600.0), first=first) <= 1


def test_what_is_remembered_is_bounded() -> None:
    """Three days, with other replicas at each look."""
    history, spec = fresh(TUNING), Settings(max_replicas=MAXIMUM)
    for look in range(5200):
        now = START + 50.0 * look
        replicas: tuple[Replica, ...] = tuple(
            replica(f"{look}-{number}", created_at=now - 20, reading=reading(look % 7 / 7, look % 3, at=now))
            for number in range(3)
        )
        history = decide(Signals(asked=3, replicas=replicas), history, spec, now).history
    assert len(history.meters) == 3
    assert history.known is not None
    assert len(history.known) == 3
    assert len(history.refused) == 0
    assert len(history.asked) <= 32
    assert len(history.starts.pulled) == SAMPLES
    assert len(history.series.recent) <= RECENT_MOST
    assert len(history.series.minutes) <= MINUTES
    assert len(history.series.buckets) <= BUCKETS
    assert len(history.outlook.awaited) <= AWAITED_MOST
    assert len(dump(history).encode()) <= MOST_BYTES


@pytest.mark.parametrize("step", [0.0, 1e-6, 0.5])
def test_decisions_in_quick_succession_grow_nothing(step: float) -> None:
    history, spec = fresh(TUNING), Settings(max_replicas=MAXIMUM)
    for look in range(600):
        now = START + step * look
        history = decide(
            Signals(asked=1, replicas=(replica(reading=reading(0.5, at=now)),)), history, spec, now
        ).history
    assert len(history.asked) <= 32
    assert len(history.series.recent) <= RECENT_MOST
    assert len(history.outlook.awaited) <= AWAITED_MOST
