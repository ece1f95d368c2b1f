"""The law, rule by rule."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from kvplane_operator.autoscaler.flows import Meter, Rates
from kvplane_operator.autoscaler.history import History, fresh
from kvplane_operator.autoscaler.law import Decision, Reason, decide
from kvplane_operator.autoscaler.learned import Learned, Usable
from kvplane_operator.autoscaler.panic import Panic
from kvplane_operator.autoscaler.series import Series, Steps
from kvplane_operator.autoscaler.settings import Settings, Tuning
from kvplane_operator.autoscaler.signals import Signals
from kvplane_operator.autoscaler.startup import StartTimes
from tests.kvplane_operator.autoscaler.world import (
    START,
    TUNING,
    World,
    reading,
    replica,
    reversals,
    signals,
    watched,
)

SETTINGS = Settings(max_replicas=20)
SLEEPY = Settings(max_replicas=20, scale_to_zero_after_seconds=600)
KNOWN_STARTS = StartTimes(pulled=(60.0,) * 10)
HISTORY = replace(fresh(TUNING), starts=KNOWN_STARTS)
"""A start takes 60 s, so the law looks 65 s ahead."""


def decided(seen: Signals, *, history: History | None = None, settings: Settings = SETTINGS) -> Decision:
    """At START, after a day in which all signals were there."""
    return decide(seen, watched(HISTORY) if history is None else history, settings, START)


class TestUp:
    def test_at_once_to_what_is_needed(self) -> None:
        got = decided(signals(reading(1.0, 1.4)))
        assert (got.desired, got.reason) == (3, Reason.UP)

    def test_the_sentence_has_the_numbers(self) -> None:
        assert decided(signals(reading(1.0, 1.4))).message == (
            "From 1 to 3 replicas: demand is 2.4 times what serves; demand 2.40 replicas (KV 2.40: held 1.00, queued 1.40, "
            "refused 0.00; prefill not known; thrash 0.00), in 65 s 2.40 (as now); 1 ready, 0 pending."
        )

    def test_an_exact_fit_needs_no_more(self) -> None:
        assert decided(signals(reading(1.0), reading(1.0))).desired == 2

    def test_refused_work_counts(self) -> None:
        """8,500 tokens/s were refused that would have stayed 10 s: one replica."""
        rates = Rates(admitted=9.0, refused=1.0, shed_tokens=8500.0)
        history = replace(watched(HISTORY), meters={"r0": Meter(reading(1.0), rates)})
        got = decided(signals(reading(1.0)), history=history)
        assert (got.desired, got.demand.shed) == (2, pytest.approx(1.0))

    def test_at_most_double_or_four_in_15_s(self) -> None:
        got = decided(signals(reading(1.0, 10.0)))
        assert (got.desired, got.reason) == (5, Reason.UP_LIMITED)
        got = decided(signals(*[reading(1.0, 2.0)] * 6))
        assert (got.desired, got.reason) == (12, Reason.UP_LIMITED)

    def test_what_was_added_a_moment_ago_counts_as_added(self) -> None:
        before = replace(watched(HISTORY), asked=((START - 20, 1), (START - 14, 2), (START - 5, 6)))
        seen = signals(reading(1.0, 10.0), asked=6)
        assert decided(seen, history=before).desired == 6
        later = replace(before, asked=((START - 20, 1), (START - 16, 2), (START - 5, 6)))
        assert decided(seen, history=later).desired == 11

    def test_not_above_the_maximum(self) -> None:
        got = decided(signals(reading(1.0, 10.0)), settings=Settings(max_replicas=3))
        assert (got.desired, got.reason) == (3, Reason.AT_MAXIMUM)
        got = decided(signals(*[reading(1.0, 2.0)] * 3), settings=Settings(max_replicas=3))
        assert (got.desired, got.reason) == (3, Reason.AT_MAXIMUM)

    def test_not_below_the_minimum(self) -> None:
        got = decided(signals(reading()), settings=Settings(min_replicas=3, max_replicas=9))
        assert (got.desired, got.reason) == (3, Reason.TO_MINIMUM)
        assert decided(Signals(asked=0), settings=Settings(min_replicas=2, max_replicas=9)).desired == 2

    def test_a_single_long_request_asks_for_no_second_group(self) -> None:
        """A ring's group that is filled by one prompt: more groups would not make it faster."""
        assert decided(signals(reading(1.15, running=1.0))).desired == 1

    def test_noise_is_kept_free(self) -> None:
        recent = tuple((START - 5 * step, 1.9 + 0.2 * (step % 2)) for step in range(12, 0, -1))
        noisy = replace(watched(HISTORY), series=Series(recent=recent))
        assert decided(signals(reading(0.95), reading(0.95)), history=noisy).desired == 3
        assert decided(signals(reading(0.95), reading(0.95))).desired == 2


class TestPending:
    def seen(self, *ages: float, queue: float = 1.5, refused: bool = False) -> Signals:
        """One replica that serves more than it can, and others of these ages."""
        pending = tuple(
            replica(f"p{number}", ready=False, created_at=START - age, refused=refused)
            for number, age in enumerate(ages)
        )
        first = replica("r0", reading=reading(1.0, queue))
        return Signals(asked=1 + len(ages), replicas=(first, *pending))

    def test_those_on_their_way_count(self) -> None:
        assert decided(self.seen(10.0, 10.0)).desired == 3

    def test_they_lock_nothing(self) -> None:
        assert decided(self.seen(10.0)).desired == 3

    def test_those_not_yet_made_count_too(self) -> None:
        assert decided(signals(reading(1.0, 1.5), asked=3)).desired == 3

    def test_another_is_asked_for_in_place_of_one_that_is_lost(self) -> None:
        assert decided(self.seen(10.0, 500.0)).desired == 4

    def test_one_that_starts_long_after_it_was_made_is_not_lost(self) -> None:
        """It waited an hour for a node, or served for an hour, and starts since ten seconds."""
        seen = self.seen(10.0, 3600.0)
        back = replace(seen.replicas[-1], changed_at=START - 10)
        assert decided(replace(seen, replicas=(*seen.replicas[:-1], back))).desired == 3

    def test_but_not_where_that_one_would_be_refused_too(self) -> None:
        assert decided(self.seen(10.0, 500.0, refused=True)).desired == 3

    def test_where_all_crash_there_are_at_most_as_many_again_as_are_needed(self) -> None:
        """Three are needed and two serve: what is started in place of the others crashes as they do."""
        world = World(lambda _: 2.4, replicas=2)
        world.history = HISTORY
        world.crashes = lambda name: name.startswith("new")
        decisions = world.run(3600.0)
        assert max(decision.desired for decision in decisions) == 6
        assert reversals(decisions, first=2) == 0
        assert (decisions[-1].desired, decisions[-1].reason) == (6, Reason.LATE)

    def test_those_that_crash_go_when_others_serve(self) -> None:
        world = World(lambda _: 2.05, replicas=2)
        world.history = HISTORY
        world.crashes = lambda name: name == "new-1"
        decisions = world.run(1200.0)
        assert decisions[-1].desired == 3
        assert "new-1" not in world.created
        assert reversals(decisions, first=2) == 1

    def test_those_that_drain_are_no_room(self) -> None:
        seen = signals(reading(1.0, 0.5), asked=1)
        going = replica("goes", draining=True, reading=reading(0.5))
        got = decided(replace(seen, replicas=(*seen.replicas, going)))
        assert (got.desired, got.demand.total) == (2, pytest.approx(1.5))


class TestDown:
    def test_as_far_as_the_demand_fits_into_what_stays(self) -> None:
        got = decided(signals(*[reading(0.28)] * 5))  # 1.4 = 0.7 x 2
        assert (got.desired, got.reason) == (2, Reason.DOWN)

    def test_not_where_it_would_be_tight(self) -> None:
        got = decided(signals(*[reading(0.72)] * 2))  # 1.44 > 0.7 x 1
        assert (got.desired, got.reason) == (2, Reason.STEADY)

    def test_not_below_the_minimum(self) -> None:
        assert decided(signals(*[reading()] * 5), settings=Settings(min_replicas=3, max_replicas=9)).desired == 3

    def test_the_highest_of_the_window_counts(self) -> None:
        minute = int(START // 60)
        before = replace(watched(HISTORY), series=Series(minutes=Steps.of([(minute - 4, 2.0)])))
        got = decided(signals(*[reading(0.1)] * 5), history=before)
        assert got.desired == 3  # 2.0 / 0.7
        long_ago = replace(before, series=Series(minutes=Steps.of([(minute - 6, 2.0)])))
        assert decided(signals(*[reading(0.1)] * 5), history=long_ago).desired == 1

    def test_a_long_start_makes_the_window_longer(self) -> None:
        minute = int(START // 60)
        slow = replace(
            watched(HISTORY), starts=StartTimes(pulled=(295.0,)), series=Series(minutes=Steps.of([(minute - 9, 2.0)]))
        )
        assert decided(signals(*[reading(0.1)] * 5), history=slow).desired == 3

    def test_lowered_to_a_maximum_that_was_lowered(self) -> None:
        got = decided(signals(*[reading(0.9)] * 5), settings=Settings(max_replicas=2))
        assert (got.desired, got.reason) == (2, Reason.TO_MAXIMUM)

    def test_minimum_and_maximum_may_be_the_same(self) -> None:
        fixed = Settings(min_replicas=3, max_replicas=3)
        for load in (0.0, 0.5, 1.1):
            assert decided(signals(*[reading(load)] * 3), settings=fixed).desired == 3

    def test_kept_for_bursts_that_come_back(self) -> None:
        """Every eight minutes 4.5 replicas for one; the last time seven minutes ago."""
        minute = int(START // 60)
        bursts = tuple((minute - back, 4.5 if back % 8 == 7 else 0.5) for back in range(47, 0, -1))
        before = replace(watched(HISTORY), series=Series(minutes=Steps.of(bursts)))
        got = decided(signals(*[reading(0.1)] * 5), history=before)
        assert (got.desired, got.reason) == (5, Reason.HELD)
        cheap = replace(SETTINGS, cost_of_miss=1.0)
        assert decided(signals(*[reading(0.1)] * 5), history=before, settings=cheap).desired == 1


class TestBlind:
    def test_one_missing_signal_lowers_nothing(self) -> None:
        got = decided(signals(reading(), reading(), None))
        assert (got.desired, got.reason, got.unread, got.active) == (3, Reason.BLIND, ("r2",), False)
        assert "signals of r2 are missing" in got.message

    def test_what_the_others_tell_may_raise(self) -> None:
        got = decided(signals(reading(1.0, 3.0), None))
        assert (got.desired, got.reason) == (4, Reason.UP)

    def test_all_missing_moves_nothing(self) -> None:
        assert decided(signals(*[None] * 6)).desired == 6
        assert "signals of r0, r1, r2 and 3 more are missing" in decided(signals(*[None] * 6)).message

    def test_only_the_users_maximum_lowers(self) -> None:
        assert decided(signals(*[None] * 6), settings=Settings(max_replicas=4)).desired == 4

    def test_while_all_start_nothing_goes(self) -> None:
        starting = tuple(replica(f"p{number}", ready=False, created_at=START) for number in range(3))
        got = decided(Signals(asked=3, replicas=starting))
        assert (got.desired, got.reason, got.active) == (3, Reason.BLIND, True)

    def test_nothing_is_learned_from_half_of_the_signals(self) -> None:
        got = decided(signals(reading(1.0), None))
        assert got.history.series == Series()
        assert got.history.outlook.trend is None

    def test_not_until_a_window_was_watched(self) -> None:
        history = replace(watched(HISTORY), watched_since=START - 299)
        got = decided(signals(*[reading()] * 3), history=history)
        assert (got.desired, got.reason) == (3, Reason.SETTLING)
        assert decided(signals(*[reading()] * 3), history=replace(history, watched_since=START - 300)).desired == 1

    def test_a_long_silence_begins_the_window_anew(self) -> None:
        world = World(lambda _: 0.1, replicas=4)
        world.blind = lambda _: 60 <= world.now - START < 180
        decisions = world.run(400.0)
        assert {decision.desired for decision in decisions} == {4}
        assert world.run(120.0)[-1].desired == 1


class TestPanic:
    def test_nothing_limits_going_up_and_nothing_goes_down(self) -> None:
        overloaded = replace(watched(HISTORY), panic=Panic(seen_since=START - 10))
        up = decided(signals(reading(1.0, 10.0)), history=overloaded)
        assert (up.desired, up.panic, up.history.panic.peak) == (11, True, 11)
        down = decided(signals(*[reading()] * 5), history=replace(overloaded, panic=Panic(until=START + 30)))
        assert (down.desired, down.reason) == (5, Reason.PANIC)

    def test_what_it_brought_goes_in_a_line(self) -> None:
        world = World(lambda seconds: 8.0 if 600 <= seconds < 700 else 0.5, startup=30.0)
        decisions = world.run(2400.0)
        counts = [decision.desired for decision in decisions]
        peak = max(counts)
        assert peak >= 8
        steps = [before - after for before, after in pairwise(counts) if after < before]
        assert max(steps) == 1  # of the line, not a cliff
        assert counts[-1] == 1
        assert any(decision.reason is Reason.GLIDING for decision in decisions)

    def test_a_missing_signal_does_not_begin_the_line_anew(self) -> None:
        """Else a fleet of which one poll in a minute fails would never get down."""
        world = World(lambda seconds: 8.0 if 600 <= seconds < 700 else 0.5, startup=30.0)
        world.blind = lambda name: name == "old-0" and (world.now - START) % 60 == 0
        assert max(decision.desired for decision in world.run(1200.0)) >= 8
        assert world.run(1200.0)[-1].desired == 1

    def test_a_need_does(self) -> None:
        gliding = replace(watched(HISTORY), panic=Panic(peak=10, gliding_since=START - 50))
        unseen = decided(signals(*[reading()] * 4, None), history=gliding)
        needed = decided(signals(*[reading(0.9)] * 5), history=gliding)
        assert (unseen.reason, unseen.history.panic.gliding_since) == (Reason.BLIND, START - 50)
        assert (needed.reason, needed.history.panic) == (Reason.STEADY, Panic(peak=10))


class TestZero:
    IDLE = reading(admitted_total=5.0)
    QUIET = Rates(admitted=0.0, refused=0.0, prompt_tokens=0.0, generation_tokens=0.0)

    def idle(self, seconds: float) -> History:
        return replace(watched(HISTORY), idle_since=START - seconds, meters={"r0": Meter(self.IDLE, self.QUIET)})

    def test_after_a_time_without_requests(self) -> None:
        got = decided(signals(self.IDLE), history=self.idle(600), settings=SLEEPY)
        assert (got.desired, got.reason) == (0, Reason.TO_ZERO)

    def test_not_before(self) -> None:
        assert decided(signals(self.IDLE), history=self.idle(599), settings=SLEEPY).desired == 1

    def test_never_unless_asked_for(self) -> None:
        assert decided(signals(self.IDLE), history=self.idle(86_000)).desired == 1

    @pytest.mark.parametrize(
        "seen",
        [
            signals(reading(running=1.0)),
            signals(reading(queued=1.0)),
            signals(None),
            signals(IDLE, wake=True),
            signals(IDLE, asked=2),
        ],
    )
    def test_not_while_anything_is_there_or_unknown(self, seen: Signals) -> None:
        waiting = replica("p", ready=False, created_at=START)
        seen = replace(seen, replicas=(*seen.replicas, waiting)) if seen.asked == 2 else seen
        assert decided(seen, history=self.idle(900), settings=SLEEPY).desired >= 1

    def test_a_request_between_two_looks_counts(self) -> None:
        busy = replace(self.idle(900), meters={"r0": Meter(self.IDLE, replace(self.QUIET, admitted=0.2))})
        got = decided(signals(self.IDLE), history=busy, settings=SLEEPY)
        assert (got.desired, got.history.idle_since) == (1, None)

    def test_one_that_cannot_be_told_yet_hides_no_busy_one(self) -> None:
        """The counters of the first began anew in the moment in which the second got a request."""
        anew = replace(self.idle(900), meters={})
        got = decided(signals(self.IDLE, reading(running=1.0)), history=anew, settings=SLEEPY)
        assert got.desired >= 1
        assert got.history.idle_since is None

    def test_one_that_no_node_takes_keeps_nothing_awake(self) -> None:
        waiting = replica("p", ready=False, created_at=START, refused=True)
        seen = Signals(asked=2, replicas=(replica("r0", reading=self.IDLE), waiting))
        got = decided(seen, history=self.idle(600), settings=replace(SLEEPY, min_replicas=2))
        assert (got.desired, got.reason) == (0, Reason.TO_ZERO)

    def test_stays_until_somebody_asks(self) -> None:
        got = decided(Signals(asked=0), settings=SLEEPY)
        assert (got.desired, got.reason) == (0, Reason.ASLEEP)
        got = decided(Signals(asked=0, wake=True), settings=replace(SLEEPY, min_replicas=2))
        assert (got.desired, got.reason) == (2, Reason.WOKEN)

    def test_there_and_back(self) -> None:
        world = World(lambda seconds: 0.3 if seconds < 100 or seconds > 1200 else 0.0, settings=SLEEPY, startup=30.0)
        assert world.run(1200.0)[-1].desired == 0
        world.wake = True
        assert world.step().desired == 1
        world.wake = False
        assert {decision.desired for decision in world.run(600.0)} == {1}


class TestTime:
    def test_starts_are_timed(self) -> None:
        world = World(lambda seconds: 0.5 if seconds < 100 else 2.5, startup=42.0)
        world.run(400.0)
        assert world.history.starts.pulled == (45.0, 45.0)  # at the first decision after 42 s
        assert world.run(5.0)[-1].horizon_seconds == 50.0

    def test_a_replica_that_falters_is_not_timed_again(self) -> None:
        first = decided(signals(reading(0.5)))
        gone = decide(Signals(asked=1, replicas=(replica("r0", ready=False),)), first.history, SETTINGS, START + 5)
        back = decide(signals(reading(0.5, at=START + 10)), gone.history, SETTINGS, START + 10)
        assert back.history.starts == KNOWN_STARTS

    def test_after_a_restart_no_start_is_timed_that_was_not_seen(self) -> None:
        assert decide(signals(reading(0.5)), HISTORY, SETTINGS, START).history.starts == KNOWN_STARTS

    def test_after_a_restart_one_that_falters_is_not_timed(self) -> None:
        """It was made an hour ago, and may have served ever since."""
        falters = Signals(asked=1, replicas=(replica("r0", ready=False),))
        first = decide(falters, HISTORY, SETTINGS, START)
        back = decide(signals(reading(0.5, at=START + 5)), first.history, SETTINGS, START + 5)
        assert back.history.starts == KNOWN_STARTS

    def test_a_start_under_way_at_a_restart_is_timed(self) -> None:
        young = replica("r0", ready=False, created_at=START - 30)
        first = decide(Signals(asked=1, replicas=(young,)), HISTORY, SETTINGS, START)
        serves = replace(young, ready=True, reading=reading(0.5, at=START + 5))
        back = decide(Signals(asked=1, replicas=(serves,)), first.history, SETTINGS, START + 5)
        assert back.history.starts.pulled[-1] == 35.0

    def test_hours_in_which_no_node_took_it_are_none_of_a_start(self) -> None:
        """Three hours without a node, then a start of two minutes: ten minutes of waiting count."""
        waits, history = replica("p", ready=False, created_at=START, refused=True), watched(HISTORY)
        for minute in range(182):
            now = START + 60 * minute
            serving, waits = replica("r0", reading=reading(0.5, at=now)), replace(waits, refused=minute <= 180)
            history = decide(Signals(asked=2, replicas=(serving, waits)), history, SETTINGS, now).history
        now += 60
        pair = tuple(replace(each, ready=True, reading=reading(0.3, at=now)) for each in (serving, waits))
        got = decide(Signals(asked=2, replicas=pair), history, SETTINGS, now)
        assert got.history.starts.pulled[-1] == 715.0
        assert got.history.refused == {}

    def test_the_window_is_no_longer_than_demand_is_remembered(self) -> None:
        slow = replace(watched(HISTORY), starts=StartTimes(pulled=(10_800.0,)), watched_since=START - 14_400)
        assert decided(signals(*[reading(0.1)] * 5), history=slow).reason is Reason.DOWN

    def test_a_clock_set_back_is_a_restart(self) -> None:
        late = decided(signals(reading(0.5))).history
        early = decide(signals(*[reading()] * 4), late, SETTINGS, START - 7200)
        assert (early.desired, early.reason) == (4, Reason.SETTLING)
        assert early.history.began_at == START - 7200


class TestPrompts:
    def test_a_rate_that_was_learned_too_low_is_left_behind(self) -> None:
        """170 prompt tokens a second look like the work of two replicas, and nobody waits who would show that one can do it."""
        rates = Rates(prompt_tokens=170.0)
        learned = Learned(usable=Usable(share=0.85), prefill_tokens_per_second=100.0)
        before = replace(watched(HISTORY), learned=learned, meters={"r0": Meter(reading(0.1), rates)})
        first = decided(signals(reading(0.1), reading(0.1)), history=before)
        assert first.demand.total == pytest.approx(2.0)
        rate = first.history.learned.prefill_tokens_per_second
        assert rate == pytest.approx(100 * (1 + 5 / 43_200))


class TestCourse:
    @pytest.mark.parametrize("replicas", [1, 3, 12])
    def test_a_steady_load_is_met_once_and_left_alone(self, replicas: int) -> None:
        world = World(lambda _: 2.4, replicas=replicas)
        decisions = world.run(3600.0)
        assert reversals(decisions, first=replicas) == 0
        assert 3 <= decisions[-1].desired <= 4

    def test_a_step_is_answered_within_one_decision(self) -> None:
        world = World(lambda seconds: 0.6 if seconds < 600 else 1.8)
        world.run(600.0)
        assert world.step().desired == 2

    def test_a_ramp_is_answered_ahead(self) -> None:
        """One replica more every five minutes, and a start takes 60 s: each is there before it is needed."""
        as_planned = Settings(max_replicas=50, tuning=Tuning(usable_most=TUNING.usable_start))
        world = World(lambda seconds: 1.5 + seconds / 300, settings=as_planned)
        world.run(1800.0)
        for _ in range(360):
            ready = len(world.signals().ready)
            assert world.step().demand.total <= ready


class TestSettings:
    @pytest.mark.parametrize(
        ("fields", "text"),
        [
            ({"min_replicas": 0}, "min_replicas must be at least 1; it is 0."),
            ({"max_replicas": 0}, "max_replicas must be at least min_replicas, 1; it is 0."),
            ({"scale_to_zero_after_seconds": 0}, "scale_to_zero_after_seconds must be at least 1; it is 0."),
            ({"scale_down_window_seconds": -1}, "scale_down_window_seconds must be at least 0; it is -1."),
            ({"cost_of_miss": float("nan")}, "cost_of_miss must be at least 0; it is nan."),
        ],
    )
    def test_bounds(self, fields: dict[str, Any], text: str) -> None:
        with pytest.raises(ValueError, match=text):
            Settings(**{"max_replicas": 9, **fields})
