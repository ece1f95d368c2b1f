"""Order and fairness of what waits; buckets; when to come back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane_runtime.admission import retry
from kvplane_runtime.admission.buckets import TokenBuckets
from kvplane_runtime.admission.demand import Demand, Entry, Reason
from kvplane_runtime.admission.queue import Queue, Waiting


def waiting(
    tokens: int = 100,
    *,
    at: float = 0.0,
    tenant: str = "",
    priority: int = 0,
    patience: float = 10.0,
    returned: bool = False,
) -> Waiting:
    entry = Entry(Demand(tokens, tenant=tenant, priority=priority, prompt_bytes=tokens), arrived_at=at)
    return Waiting(
        entry,
        expires_at=at + patience,
        forced_at=at + 0.8 * patience,
        held_by=Reason.KV,
        returned=returned,
        not_before=at + 0.25 if returned else at,
    )


def queue(*requests: Waiting) -> Queue:
    made = Queue()
    for one in requests:
        made.put(one, now=one.entry.arrived_at)
    return made


def in_order(made: Queue, *, now: float) -> list[int]:
    """Prompt tokens of the requests as they would go if all fitted."""
    order = []
    while turns := made.turns(now=now):
        order.append(turns[0].entry.demand.prompt_tokens)
        made.take(turns[0].entry)
    return order


def test_short_prompts_go_first_and_waiting_counts() -> None:
    made = queue(waiting(3000, at=0.0), waiting(2500, at=0.0), waiting(100, at=2.0), waiting(700, at=2.0))
    assert in_order(made, now=2.0) == [100, 2500, 700, 3000]


def test_aging_is_a_thousand_tokens_a_second() -> None:
    assert in_order(queue(waiting(1900, at=0.0), waiting(1000, at=1.0)), now=1.0) == [1900, 1000]
    assert in_order(queue(waiting(2100, at=0.0), waiting(1000, at=1.0)), now=1.0) == [1000, 2100]


def test_after_most_of_its_time_a_request_goes_first() -> None:
    assert in_order(queue(waiting(9000, at=0.0), waiting(10, at=0.0, patience=60)), now=7.9) == [10, 9000]
    assert in_order(queue(waiting(9000, at=0.0), waiting(10, at=0.0, patience=60)), now=8.0) == [9000, 10]


def test_of_those_the_one_that_runs_out_first() -> None:
    made = queue(waiting(1, at=0.0, patience=10), waiting(2, at=0.0, patience=9.5))
    assert in_order(made, now=9.0) == [2, 1]


def test_higher_classes_go_first_until_time_presses() -> None:
    requests = [waiting(10, priority=1), waiting(5000, priority=0, at=1.0)]
    assert in_order(queue(*requests), now=2.0) == [5000, 10]
    assert in_order(queue(*requests), now=8.5) == [10, 5000]


def test_what_the_engine_sent_back_goes_before_all_after_a_pause() -> None:
    made = queue(waiting(10), waiting(7000, returned=True))
    assert [one.entry.demand.prompt_tokens for one in made.turns(now=0.1)] == [10]
    assert in_order(made, now=0.3) == [7000, 10]


def test_the_tenant_least_served_goes_first() -> None:
    made = queue(waiting(10, tenant="busy"), waiting(5000, tenant="idle"))
    made.charge("busy", prompt_tokens=100, output_tokens=50, now=0.0)
    assert in_order(made, now=0.0) == [5000, 10]


def test_service_is_forgotten_by_half_in_a_minute() -> None:
    made = queue(waiting(1, tenant="then", patience=99), waiting(2, tenant="now", patience=99))
    made.charge("then", prompt_tokens=1000, output_tokens=0, now=0.0)
    made.charge("now", prompt_tokens=600, output_tokens=0, now=60.0)
    assert [one.entry.demand.tenant for one in made.turns(now=60.0)] == ["then", "now"]


def test_a_new_name_earns_no_credit() -> None:
    made = queue(waiting(10, tenant="a"), waiting(10, tenant="b"))
    made.charge("a", prompt_tokens=500, output_tokens=0, now=0.0)
    made.charge("b", prompt_tokens=700, output_tokens=0, now=0.0)
    made.put(waiting(20, tenant="new"), now=0.0)
    assert [one.entry.demand.tenant for one in made.turns(now=0.0)] == ["a", "new", "b"]


def test_over_time_tenants_get_equal_shares_whatever_they_ask_for() -> None:
    """One floods with short prompts, one sends few long ones: both always have something waiting."""
    made = Queue()
    got = {"flood": 0, "few": 0}
    for number in range(400):
        for _ in range(5):
            made.put(waiting(50, at=0.0, tenant="flood", patience=1e6), now=0.0)
        if number % 3 == 0:
            made.put(waiting(400, at=0.0, tenant="few", patience=1e6), now=0.0)
    for _ in range(1000):
        demand = made.turns(now=1.0)[0].entry.demand
        made.take(made.turns(now=1.0)[0].entry)
        made.charge(demand.tenant, prompt_tokens=demand.prompt_tokens, output_tokens=0, now=1.0)
        got[demand.tenant] += demand.prompt_tokens
    assert got["flood"] == pytest.approx(got["few"], rel=0.02)


def test_a_full_queue_makes_room_for_who_has_less_in_it() -> None:
    crowd = [waiting(100 + number, at=number, tenant="crowd") for number in range(5)]
    made = queue(*crowd, waiting(10, tenant="other"))
    assert made.crowding("crowd") is None
    assert made.crowding("other") is crowd[-1]
    assert made.crowding("third") is crowd[-1]
    assert queue(waiting(1, tenant="a"), waiting(1, tenant="b")).crowding("c") is None
    assert Queue().crowding("") is None


def test_what_goes_before_a_request() -> None:
    first, second, third = waiting(100), waiting(300), waiting(200)
    made = queue(first, second, third)
    assert made.ahead() == {first.entry: 0, third.entry: 100, second.entry: 300}
    new = waiting(250).entry
    assert made.ahead(of=new)[new] == 300


def test_a_crowd_of_another_tenant_is_met_in_turns() -> None:
    made = queue(*(waiting(100, tenant="crowd") for _ in range(50)), waiting(40, tenant="few"))
    new = Entry(Demand(150, tenant="other"), arrived_at=0.0)
    # While it gets 150 tokens, the crowd gets as many, and the few all of their 40.
    assert made.ahead(of=new)[new] == 190


def test_classes_are_not_before_each_other() -> None:
    high, low = waiting(100, priority=0), waiting(10, priority=1)
    assert queue(low, high).ahead() == {high.entry: 0, low.entry: 0}


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 5000),
        st.floats(0, 20),
        st.sampled_from(["", "a", "b"]),
        st.integers(0, 2),
        st.floats(0.1, 30),
        st.booleans(),
    ),
    max_size=30,
)


@given(REQUESTS, st.floats(0, 60))
def test_everyone_gets_a_turn_and_nothing_is_left_over(
    requests: list[tuple[int, float, str, int, float, bool]], now: float
) -> None:
    made = queue(
        *(
            waiting(tokens, at=at, tenant=tenant, priority=priority, patience=patience, returned=returned)
            for tokens, at, tenant, priority, patience, returned in requests
        )
    )
    assert made.prompt_tokens == made.prompt_bytes == sum(request[0] for request in requests)
    assert sorted(in_order(made, now=max(now, 30.0))) == sorted(request[0] for request in requests)
    assert (len(made), made.prompt_tokens, made.prompt_bytes, made.next_expiry()) == (0, 0, 0, None)


def test_tenants_remembered_are_bounded() -> None:
    made = Queue()
    for number in range(5000):
        made.charge(f"tenant-{number}", prompt_tokens=10, output_tokens=0, now=0.0)
    assert made.tenants == 1024


# Buckets.


def test_a_bucket_holds_a_minutes_worth_and_fills() -> None:
    buckets = TokenBuckets()
    assert buckets.wait("a", rate=10, now=0.0) == 0
    buckets.pay("a", 700, rate=10, now=0.0)  # 600 were in it
    assert buckets.wait("a", rate=10, now=0.0) == 10
    assert buckets.wait("a", rate=10, now=6.0) == pytest.approx(4)
    assert buckets.wait("b", rate=10, now=0.0) == 0
    buckets.pay("a", -200, rate=10, now=6.0)
    assert buckets.wait("a", rate=10, now=6.0) == 0


def test_idling_saves_up_no_more_than_a_minute() -> None:
    buckets = TokenBuckets()
    buckets.pay("a", 1, rate=10, now=0.0)
    buckets.pay("a", 610, rate=10, now=1e6)
    assert buckets.wait("a", rate=10, now=1e6) == 1


def test_buckets_are_bounded() -> None:
    buckets = TokenBuckets()
    for number in range(10_000):
        buckets.pay(f"tenant-{number}", 1, rate=10, now=0.0)
    assert len(buckets) == 4096


# Retry-After.


@given(st.floats(0, 1e12), st.floats(0, 1, exclude_max=True))
def test_retry_after_is_whole_seconds_from_1_to_30(wait: float, uniform: float) -> None:
    assert retry.seconds(wait, uniform=uniform) in range(1, 31)


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0, 1, exclude_max=True))
def test_who_must_wait_longer_is_told_no_less(a: float, b: float, uniform: float) -> None:
    low, high = sorted((a, b))
    assert retry.seconds(low, uniform=uniform) <= retry.seconds(high, uniform=uniform)


def test_it_is_spread() -> None:
    assert [retry.seconds(10, uniform=uniform) for uniform in (0.0, 0.5, 0.999)] == [8, 11, 13]


def test_those_sent_away_are_before_the_next() -> None:
    backlog = retry.Backlog()
    assert backlog.seconds(1000) == 0  # no rate is known
    for second in range(20):
        backlog.until(float(second), waited=True)
        backlog.admitted(500)
    assert backlog.seconds(1000) == pytest.approx(2, rel=0.2)
    backlog.refused(1000)
    backlog.refused(1000)
    assert backlog.seconds(1000) == pytest.approx(2, rel=0.2)
    assert backlog.seconds(1000, returning=True) == pytest.approx(6, rel=0.2)
    backlog.until(22.0, waited=False)
    assert backlog.seconds(1000, returning=True) == pytest.approx(3.5, rel=0.3)


def test_the_clients_own_rate_is_not_the_engines() -> None:
    backlog = retry.Backlog()
    for second in range(20):
        backlog.until(float(second), waited=False)
        backlog.admitted(5)
    assert backlog.seconds(1000) == 0
