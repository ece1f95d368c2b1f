"""What admission learns from measurements: the line, the pace, prefills, kappa, and what one more request costs."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane_runtime.admission.demand import Demand, Entry
from kvplane_runtime.admission.goals import Cost, Slacks, newly_missed
from kvplane_runtime.admission.inflight import Running
from kvplane_runtime.admission.lengths import Curve, draw
from kvplane_runtime.admission.line import Line
from kvplane_runtime.admission.pace import Pace
from kvplane_runtime.admission.prefill import Prefill
from kvplane_runtime.admission.trim import FLOOR, WASTE_SHARE, Trim

POINTS = st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 10)), min_size=8, max_size=40)


def line(
    points: Sequence[tuple[float, float]], *, through_origin: bool = False, doubt: float = 1.0
) -> tuple[float, float]:
    fitted = Line(keep=0.98, through_origin=through_origin, doubt=doubt)
    for x, y in points:
        fitted.add(x, y)
    fit = fitted.fit()
    assert fit is not None
    return fit


def test_a_line_is_found() -> None:
    intercept, slope = line([(x, 0.01 + 0.002 * x) for x in range(0, 60, 3)])
    assert intercept == pytest.approx(0.01, rel=0.05)
    assert slope == pytest.approx(0.002, rel=0.01)


def test_one_place_gives_what_is_likely() -> None:
    assert line([(4.0, 0.02)] * 20) == pytest.approx((0.02, 0.0))
    assert line([(400.0, 0.2)] * 20, through_origin=True) == pytest.approx((0.0, 0.0005), abs=1e-9)


def test_old_points_are_forgotten() -> None:
    _, slope = line([(x, 0.1 * x) for x in range(20)] * 20 + [(x, 0.01 * x) for x in range(20)] * 20)
    assert slope == pytest.approx(0.01, rel=0.05)


@given(POINTS, st.booleans())
def test_a_line_is_never_negative(points: list[tuple[float, float]], through_origin: bool) -> None:
    intercept, slope = line(points, through_origin=through_origin)
    assert slope >= 0
    assert intercept >= -1e-9


def test_seven_points_say_nothing() -> None:
    fitted = Line(keep=0.98, through_origin=False, doubt=1.0)
    for x in range(7):
        fitted.add(x, x)
    assert fitted.fit() is None


def test_a_step_is_learned_without_the_prefills_in_it() -> None:
    """10 ms + 1 ms for each sequence; half of every second window goes into prefills of 1 ms per token."""
    pace = Pace()
    now = 0.0
    assert pace.window(now=now) is None
    for number in range(60):
        sequences = number % 25 + 1
        prompt = 250 if number % 2 else 0
        now += 0.5
        pace.sequences(sequences, now=now)
        pace.prefilled(prompt)
        length = pace.window(now=now)
        assert length is not None
        step = (0.010 + 0.001 * sequences) / (1 - 0.001 * prompt / length)
        pace.close(length, [step, step, 9.0], seconds_per_prompt_token=0.001, now=now)  # one reader is slow
        assert pace.seconds_per_token == step
    assert pace.step(20) == pytest.approx(0.030, rel=0.05)


def test_a_window_without_tokens_teaches_nothing() -> None:
    pace = Pace()
    for number in range(20):
        if (length := pace.window(now=number * 1.0)) is not None:
            pace.close(length, [], seconds_per_prompt_token=0.0, now=number * 1.0)
    assert pace.step(1) is None
    assert pace.seconds_per_token is None


def allows(prefill: Prefill, tokens: int, *, batched_tokens: int | None = 500, in_time: bool = False) -> bool:
    return prefill.allows(tokens, promised=0.05, batched_tokens=batched_tokens, in_time=in_time)


def test_before_a_prefill_was_seen_a_step_of_the_engine_is_sent() -> None:
    prefill = Prefill()
    assert prefill.seconds(1000) == 0
    assert allows(prefill, 9000)  # alone, whatever its length
    prefill.outstanding = 300
    assert allows(prefill, 200)
    assert not allows(prefill, 201)
    assert allows(prefill, 1700, batched_tokens=None)


def test_then_what_is_computed_in_two_promised_times_per_token() -> None:
    prefill = Prefill()
    for tokens in (100, 400, 200, 900, 300, 600, 150, 800, 500):
        prefill.learn(outstanding=tokens, seconds=0.02 + 0.0005 * tokens)
    assert prefill.seconds(1000) == pytest.approx(0.52, rel=0.02)
    prefill.outstanding = 50
    assert allows(prefill, 149)  # 0.1 s is 200 tokens
    assert not allows(prefill, 160)
    assert allows(prefill, 740, in_time=True)  # 0.4 s
    assert not allows(prefill, 760, in_time=True)


CAPACITY = 1000.0


def learn(
    trim: Trim, *, preempted: float = 0.0, ratio: float = 1.0, pays: bool = True, fixed: float | None = None
) -> float:
    trim.learn(processed=2000, preempted=preempted, capacity=CAPACITY, peak_ratio=ratio, pays=pays, fixed=fixed)
    return trim.kappa


def test_kappa_rises_above_one_only_where_that_lets_requests_in_in_time() -> None:
    trim = Trim()
    assert learn(trim, pays=False) == 1.0
    assert learn(trim) > 1.0


def test_kappa_comes_back_to_one_by_itself() -> None:
    trim = Trim()
    trim.kappa = 0.9
    for _ in range(100):
        learn(trim, pays=False)
    assert trim.kappa == pytest.approx(1.0, abs=0.005)


def test_a_quiet_engine_says_nothing() -> None:
    trim = Trim()
    trim.kappa = 0.9
    assert learn(trim, ratio=0.5) == 0.9


def test_a_long_context_thrown_away_costs_more_than_a_short_one() -> None:
    short, long = Trim(), Trim()
    assert learn(short, preempted=20) > learn(long, preempted=200)


def test_in_balance_the_budget_is_spent() -> None:
    """The engine throws tokens away in proportion to how far kappa is above 1.05."""
    trim = Trim()
    preempted = 0.0
    for _ in range(3000):
        wasted = max(0.0, trim.kappa - 1.05) * 1000
        preempted += wasted
        learn(trim, preempted=wasted)
    assert preempted / (3000 * 2000) == pytest.approx(WASTE_SHARE, rel=0.1)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 2)), max_size=50), st.sampled_from([None, 0.6, 1.0, 2.0]))
def test_kappa_stays_within_its_bounds(events: list[tuple[float, float]], fixed: float | None) -> None:
    trim = Trim()
    for preempted, ratio in events:
        kappa = learn(trim, preempted=preempted, ratio=ratio, fixed=fixed)
        assert min(FLOOR, fixed or 1) <= kappa <= (fixed or 1.25)


def running(
    generated: int,
    *,
    seconds_per_token: float,
    curve: Curve,
    limit: int | None = None,
    first_token_at: float | None = 0.0,
) -> Running:
    entry = Entry(Demand(100), arrived_at=0.0, first_token_at=first_token_at, generated=generated)
    return Running(
        entry,
        sent_at=0.0,
        curve=curve,
        limit=limit,
        expected_output=0.0,
        prefill_outstanding=100,
        last_at=seconds_per_token * (generated - 1),
    )


def cost(*, stall: float, slower_step: float = 0.02, under_way: float = 0.0) -> Cost:
    return Cost(promised=0.05, step=0.02, slower_step=slower_step, under_way=under_way, stall=stall)


SOON = draw([(12, False)] * 100)
LATE = draw([(1000, True)] * 100)


def test_a_long_output_bears_a_prefill_that_a_short_one_does_not() -> None:
    assert newly_missed([running(5, seconds_per_token=0.03, curve=LATE)], cost(stall=0.5), enough=9) == 0
    missed = newly_missed([running(5, seconds_per_token=0.03, curve=SOON)], cost(stall=0.5), enough=9)
    assert missed == pytest.approx(1, abs=0.05)


def test_what_will_miss_anyway_costs_nothing_more() -> None:
    lost = running(11, seconds_per_token=0.3, curve=SOON, limit=12)
    assert newly_missed([lost], cost(stall=0.5), enough=9) == 0


def test_a_limit_ends_an_output() -> None:
    """Twenty tokens are too few to make up for 0.6 s, a thousand are not."""
    assert newly_missed([running(5, seconds_per_token=0.03, curve=LATE, limit=20)], cost(stall=0.6), enough=9) == 1
    assert newly_missed([running(5, seconds_per_token=0.03, curve=LATE, limit=1000)], cost(stall=0.6), enough=9) == 0


def test_a_slower_step_costs_too() -> None:
    late = running(6, seconds_per_token=0.075, curve=SOON)
    assert newly_missed([late], cost(stall=0.0), enough=9) == 0
    assert newly_missed([late], cost(stall=0.0, slower_step=0.04), enough=9) > 0.5


def test_prefills_under_way_count_before_the_new_one() -> None:
    one = running(30, seconds_per_token=0.03, curve=SOON)
    assert newly_missed([one], cost(stall=0.3), enough=9) == 0
    assert newly_missed([one], cost(stall=0.3, under_way=0.5), enough=9) > 0


def test_before_the_first_token_there_is_no_pace_to_keep() -> None:
    assert (
        newly_missed([running(0, seconds_per_token=0, curve=SOON, first_token_at=None)], cost(stall=9), enough=9) == 0
    )


@given(
    st.lists(st.tuples(st.integers(1, 300), st.floats(0.01, 0.1), st.none() | st.integers(300, 900)), max_size=10),
    st.floats(0, 5),
    st.floats(0, 5),
)
def test_more_stall_never_costs_less(requests: list[tuple[int, float, int | None]], a: float, b: float) -> None:
    curve = draw([(length, length % 3 == 0) for length in range(1, 400)])
    set_of = [running(done, seconds_per_token=pace, curve=curve, limit=limit) for done, pace, limit in requests]
    less, more = sorted((a, b))
    low = newly_missed(set_of, cost(stall=less), enough=99)
    high = newly_missed(set_of, cost(stall=more), enough=99)
    assert -1e-9 <= low <= high + 1e-9
    assert high <= len(set_of) + 1e-9


@given(st.data(), st.floats(0, 5), st.floats(0, 5))
def test_only_those_with_little_slack_are_looked_at_and_it_makes_no_difference(
    data: st.DataObject, stall: float, under_way: float
) -> None:
    """Whatever comes, grows and goes, and whatever was promised before."""
    curve = draw([(length, length % 3 == 0) for length in range(1, 400)])
    slacks, flight = Slacks(), dict[int, Running]()
    for promised, key, tokens, pace in data.draw(
        st.lists(
            st.tuples(
                st.sampled_from([0.04, 0.05]),
                st.integers(0, 5),
                st.integers(0, 300),
                st.sampled_from([0.03, 0.045, 0.08]),
            ),
            max_size=30,
        )
    ):
        if tokens:
            one = flight.setdefault(key, running(1, seconds_per_token=pace, curve=curve))
            one.entry.generated, one.last_at = tokens, pace * (tokens - 1)
            slacks.put(one)
        elif key in flight:
            slacks.take(flight.pop(key))
        whole = Cost(promised=promised, step=0.02, slower_step=0.03, under_way=under_way, stall=stall)
        tight = list(slacks.below(stall + under_way, promised=promised))
        assert newly_missed(tight, whole, enough=99) == pytest.approx(
            newly_missed(flight.values(), whole, enough=99), abs=1e-6
        )
        assert len(tight) == len(set(tight)) <= len(flight)


def test_who_is_well_is_not_looked_at() -> None:
    slacks = Slacks()
    for one in (
        (well := running(100, seconds_per_token=0.03, curve=SOON)),
        running(2, seconds_per_token=0.05, curve=SOON),
    ):
        slacks.put(one)
    assert well not in slacks.below(1.0, promised=0.05)
    assert well in slacks.below(3.0, promised=0.05)
