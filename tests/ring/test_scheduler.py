"""The scheduler's rules, one by one, on ranks without a model."""

from dataclasses import replace

import pytest

from kvplane_runtime.ring.accounting import Reserve
from kvplane_runtime.ring.admission import Refusal
from kvplane_runtime.ring.layout import Layout
from kvplane_runtime.ring.requests import Accepted, Ended, Failed, Policy, Progress
from kvplane_runtime.ring.scheduler import Scheduler
from tests.ring.simulated import POLICY, Ring, prompt, reference, sampled, seconds


def test_a_long_prompt_is_computed_in_windows_over_all_ranks_and_then_decoded() -> None:
    ring = Ring()
    assert ring.submit("a", prompt(200)) == Accepted("a", 0, 4)
    ring.drain()
    windows = [step.window for step in ring.steps if step.window is not None]
    assert all(window.placement == "zigzag" for window in windows)
    assert [len(window.tokens) % 8 for window in windows[:-1]] == [0] * (len(windows) - 1)
    assert [window.logits for window in windows] == [False] * (len(windows) - 1) + [True]
    assert ring.tokens("a") == reference(prompt(200), 0, 4, frozenset())
    assert ring.events[-1] == Ended("a", 0, "length")
    held = ring.ranks.held()
    assert sum(held) == 203
    assert max(held) - min(held) <= 2


def test_progress_is_told_after_each_window_but_the_last() -> None:
    ring = Ring()
    ring.submit("a", prompt(200))
    ring.drain()
    progress = [event for event in ring.events if isinstance(event, Progress)]
    assert [event.computed for event in progress] == sorted(event.computed for event in progress)
    assert progress[0] == Progress("a", 64, 200)


def test_a_short_prompt_lies_whole_on_the_rank_with_the_least() -> None:
    ring = Ring()
    for name in "abcd":
        ring.submit(name, prompt(40, ord(name)))
    ring.drain()
    windows = [step.window for step in ring.steps if step.window is not None]
    placed = {window.sequence: window.placement for window in windows}
    assert len(set(placed.values())) == 4
    assert all(placed[window.sequence] == window.placement for window in windows)


def test_decode_batches_hold_all_that_run_beside_one_window() -> None:
    ring = Ring()
    ring.submit("a", prompt(10), max_tokens=20)
    ring.submit("b", prompt(10, 1), max_tokens=20)
    ring.step()
    ring.step()
    ring.submit("c", prompt(500))
    step = ring.step()
    assert step is not None
    assert [len(step.decode), step.window is not None] == [2, True]


def test_windows_grow_to_a_slice_and_no_further() -> None:
    ring = Ring(policy=Policy(window_tokens=16, slice_seconds=0.01), capacity=1_000_000)
    ring.submit("a", prompt(40_000), max_tokens=1)
    ring.drain()
    took = [seconds(step, 4) for step in ring.steps]
    assert max(took) <= 0.0101
    assert sorted(took)[len(took) // 2] > 0.008


def test_windows_keep_to_the_slice_where_queries_go_round() -> None:
    """Of 4000 tokens they are until past and new ones are twice as many: so many hide keys that go round."""
    ring = Ring(policy=Policy(window_tokens=1000, slice_seconds=0.01, keys_per_query=2.0), capacity=1_000_000)
    ring.submit("a", prompt(40_000), max_tokens=1)
    ring.drain()
    least = [len(step.window.tokens) for step in ring.steps[:2] if step.window is not None]
    assert least == [4000, 4000]
    assert max(seconds(step, 4) for step in ring.steps[2:]) <= 0.01
    assert max(seconds(step, 4) for step in ring.steps[:2]) > 0.02


def test_a_short_request_waits_for_one_window_of_a_long_one_at_most() -> None:
    ring = Ring(policy=Policy(window_tokens=16, short_tokens=8, slice_seconds=0.005, ttft_seconds=1.0))
    ring.submit("long", prompt(8_000), max_tokens=1)
    for number in range(30):
        ring.step()
        if number % 3 == 0:
            ring.submit(f"s{number}", prompt(20, number), max_tokens=1)
            first = len(ring.steps)
            while not ring.tokens(f"s{number}"):
                ring.step()
            assert len(ring.steps) - first <= 2
    ring.drain()
    assert ring.tokens("long") == reference(prompt(8_000), 0, 1, frozenset())


def test_a_long_request_goes_on_while_short_ones_keep_coming() -> None:
    ring = Ring(policy=Policy(window_tokens=16, short_tokens=8, slice_seconds=0.002, ttft_seconds=0.1))
    ring.submit("long", prompt(2_000), max_tokens=1)
    for number in range(2_000):
        ring.submit(f"s{number}", prompt(20, number), max_tokens=1)
        ring.step()
        if ring.tokens("long"):
            return
    pytest.fail("The long request starves.")


def test_of_two_equal_long_prompts_the_first_ends_first() -> None:
    ring = Ring(policy=Policy(window_tokens=16, slice_seconds=0.001))
    ring.submit("a", prompt(2_000), max_tokens=1)
    ring.submit("b", prompt(2_000, 1), max_tokens=1)
    ring.drain()
    turns = [step.window.sequence for step in ring.steps if step.window is not None]
    assert turns == sorted(turns)


@pytest.mark.parametrize(("promised", "order"), [(100.0, ["long", "short"]), (0.000_1, ["short", "long"])])
def test_a_promise_that_changes_orders_what_waits_already(promised: float, order: list[str]) -> None:
    """By a promise that is far off, the longer prefill has to begin first; by one that cannot be kept, each its own time."""
    ring = Ring()
    ring.submit("before", prompt(800), max_tokens=1)
    ring.drain()
    ring.submit("long", prompt(400, 1), max_tokens=1)
    ring.submit("short", prompt(100, 2), max_tokens=1)
    ring.scheduler.policy = replace(ring.scheduler.policy, ttft_seconds=promised)
    ring.drain()
    assert [event.request for event in ring.events if isinstance(event, Ended)] == ["before", *order]


def test_the_outputs_of_one_prompt_share_its_prefill() -> None:
    ring = Ring()
    ring.submit("a", prompt(200), outputs=3)
    ring.drain()
    for output in range(3):
        assert ring.tokens("a", output) == reference(prompt(200), output, 4, frozenset())
    assert ring.scheduler.snapshot().counts["computed_tokens"] == 200
    assert sum(len(step.fork) for step in ring.steps) == 2


def test_a_second_turn_goes_on_in_what_the_first_left() -> None:
    ring = Ring()
    ring.submit("a", prompt(200))
    ring.drain()
    second = [*prompt(200), *ring.tokens("a")[:3], 7, 7, 7]
    assert ring.submit("b", second) == Accepted("b", 203, 4)
    ring.drain()
    assert ring.tokens("b") == reference(second, 0, 4, frozenset())
    assert ring.scheduler.snapshot().kept == 1


def test_a_common_prefix_of_a_running_request_is_copied() -> None:
    ring = Ring()
    ring.submit("a", prompt(200), max_tokens=50)
    while not ring.tokens("a"):
        ring.step()
    other = [*prompt(100), 1, 2, 3]
    assert ring.submit("b", other) == Accepted("b", 100, 4)
    ring.drain()
    assert ring.tokens("a") == reference(prompt(200), 0, 50, frozenset())
    assert ring.tokens("b") == reference(other, 0, 4, frozenset())


def test_kept_prefixes_make_room_oldest_first() -> None:
    ring = Ring(ranks=2, capacity=150)
    for seed in range(4):
        assert isinstance(ring.submit(f"r{seed}", prompt(100, seed), max_tokens=1), Accepted)
        ring.drain()
    assert ring.scheduler.snapshot().counts["evicted_sequences"] == 1
    ring.submit("again", prompt(100, 3), max_tokens=1)
    assert ring.scheduler.snapshot().counts["cached_tokens"] == 99


def test_what_is_known_is_told_without_a_look_at_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Ring()
    for number in range(20):
        ring.submit(f"k{number}", prompt(40, number))
        ring.drain()
    held, tokens = ring.ranks.held(), Layout.tokens
    looked: list[int] = []

    def counted(layout: Layout, rank: int) -> int:
        looked.append(rank)
        return tokens(layout, rank)

    monkeypatch.setattr(Layout, "tokens", counted)
    known = ring.scheduler.snapshot()
    assert (known.kept, known.held, looked) == (20, held, [])


def test_what_never_fits_is_refused_with_the_ring_that_would_do() -> None:
    ring = Ring(ranks=2, capacity=1000)
    refusal = ring.submit("a", prompt(5000), max_tokens=10)
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.code) == (400, "context_length_exceeded")
    assert refusal.message == (
        "The prompt has 5000 tokens and the output may have 10; this ring of 2 ranks of 1000 KV tokens holds 2000, and a "
        "ring of 6 ranks would do. Send a shorter prompt or a lower max_tokens."
    )


def test_what_does_not_fit_now_is_told_when_to_come_back() -> None:
    ring = Ring(ranks=2, capacity=1000)
    assert isinstance(ring.submit("a", prompt(1500), max_tokens=100), Accepted)
    refusal = ring.submit("b", prompt(1500, 1), max_tokens=100)
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.code, refusal.reason) == (429, "kv_cache_full", "kv")
    assert refusal.retry_after_seconds is not None
    ring.drain()
    assert isinstance(ring.submit("b", prompt(1500, 1), max_tokens=100), Accepted)


def test_more_outputs_than_a_batch_holds_are_refused() -> None:
    ring = Ring(policy=Policy(max_sequences=2))
    ring.submit("a", prompt(10), outputs=2)
    refusal = ring.submit("b", prompt(10))
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.reason) == (429, "requests")


def test_more_outputs_than_a_batch_ever_holds_are_refused_for_good() -> None:
    ring = Ring(policy=Policy(max_sequences=2))
    refusal = ring.submit("a", prompt(10), outputs=3)
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.code, refusal.param) == (400, "too_many_outputs", "n")


def test_survive_admits_only_what_the_ring_holds_without_one_rank() -> None:
    ring = Ring(policy=Policy(window_tokens=16, reserve=Reserve.SURVIVE), ranks=4, capacity=1000)
    assert isinstance(ring.submit("a", prompt(3500), max_tokens=10), Refusal)
    assert isinstance(ring.submit("a", prompt(2900), max_tokens=10), Accepted)
    assert (ring.scheduler.snapshot().capacity_tokens, ring.scheduler.snapshot().limit_tokens) == (1000, 742)
    for _ in range(5):
        ring.step()
    ring.reform({0: 0, 1: 1, 3: 2}, 3)
    assert ring.scheduler.snapshot().parked == 0
    ring.drain()
    assert ring.tokens("a") == reference(prompt(2900), 0, 10, frozenset())


def test_without_max_tokens_an_output_gets_the_default_or_what_fits() -> None:
    ring = Ring(ranks=2, capacity=1000)
    assert ring.submit("a", prompt(100), max_tokens=None) == Accepted("a", 0, 32)
    ring.drain()
    accepted = ring.submit("b", prompt(1990, 1), max_tokens=None)
    assert isinstance(accepted, Accepted)
    assert 1 <= accepted.max_tokens <= 11


def test_what_is_served_is_bounded_by_the_settings_too() -> None:
    ring = Ring(policy=replace(POLICY, context_tokens=120))
    refusal = ring.submit("a", prompt(100), max_tokens=21)
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.code) == (400, "context_length_exceeded")
    assert isinstance(ring.submit("a", prompt(120), max_tokens=None), Refusal)
    assert ring.submit("a", prompt(100), max_tokens=None) == Accepted("a", 0, 20)
    assert ring.scheduler.snapshot().longest_tokens == 120


def test_a_lost_rank_does_not_change_what_the_ring_is_said_to_take() -> None:
    ring = Ring(ranks=4, capacity=1000)
    assert ring.scheduler.snapshot().whole_tokens == 4000
    ring.reform({0: 0, 1: 1, 3: 2}, 3)
    assert ring.scheduler.snapshot().whole_tokens == 4000


def test_a_cancelled_request_sends_nothing_more_and_leaves_its_prefix() -> None:
    ring = Ring()
    ring.submit("a", prompt(200))
    ring.step()
    ring.scheduler.cancel("a")
    assert ring.step() is None
    assert ring.scheduler.snapshot().active == (0, 0, 0, 0)
    assert ring.submit("b", prompt(200)) == Accepted("b", 64, 4)


def test_a_request_cancelled_during_a_step_gets_nothing_of_it() -> None:
    ring = Ring()
    ring.submit("a", prompt(10))
    step = ring.scheduler.plan(epoch=0, number=0, now=0.0)
    assert step is not None
    ring.scheduler.cancel("a")
    tokens = sampled(ring.scheduler, step, ring.ranks.run(step))
    assert ring.scheduler.complete(step, tokens, seconds=0.01) == []
    assert ring.scheduler.snapshot().active == (0, 0, 0, 0)


def test_one_output_of_several_can_be_cancelled() -> None:
    ring = Ring()
    ring.submit("a", prompt(100), outputs=2, max_tokens=10)
    while len(ring.tokens("a")) < 3:
        ring.step()
    ring.scheduler.cancel("a", 0)
    ring.drain()
    assert len(ring.tokens("a", 0)) == 3
    assert ring.tokens("a", 1) == reference(prompt(100), 1, 10, frozenset())


def test_cancelling_the_output_that_computes_the_prompt_costs_the_others_nothing() -> None:
    ring = Ring()
    ring.submit("a", prompt(400), outputs=3)
    ring.step()
    ring.scheduler.cancel("a", 0)
    ring.drain()
    assert ring.tokens("a", 0) == []
    for output in (1, 2):
        assert ring.tokens("a", output) == reference(prompt(400), output, 4, frozenset())
    assert ring.scheduler.snapshot().counts["computed_tokens"] == 400


@pytest.mark.parametrize("lost", range(4))
def test_after_a_loss_only_what_was_lost_is_computed_and_the_tokens_are_the_same(lost: int) -> None:
    ring = Ring()
    ring.submit("a", prompt(2000), max_tokens=300)
    while len(ring.tokens("a")) < 200:
        ring.step()
    held = ring.ranks.held()[lost]
    left = [rank for rank in range(4) if rank != lost]
    ring.reform({old: new for new, old in enumerate(left)}, 3)
    ring.drain()
    assert ring.tokens("a") == reference(prompt(2000), 0, 300, frozenset())
    assert ring.scheduler.snapshot().counts["refilled_tokens"] == held


def test_a_step_that_broke_leaves_no_trace() -> None:
    ring = Ring()
    ring.submit("a", prompt(100), outputs=2, max_tokens=10)
    while len(ring.tokens("a")) < 3:
        ring.step()
    step = ring.scheduler.plan(epoch=0, number=99, now=ring.now)
    assert step is not None
    ring.ranks.run(step)
    ring.reform({0: 0, 1: 1, 2: 2, 3: 3}, 4)
    ring.drain()
    assert ring.scheduler.snapshot().counts["refilled_tokens"] == 0
    for output in range(2):
        assert ring.tokens("a", output) == reference(prompt(100), output, 10, frozenset())


def test_what_does_not_fit_the_smaller_ring_is_parked_until_the_rank_is_back() -> None:
    ring = Ring(ranks=2, capacity=1000)
    ring.submit("small", prompt(300), max_tokens=50)
    ring.submit("large", prompt(1200, 1), max_tokens=50)
    while not ring.tokens("large"):
        ring.step()
    ring.reform({0: 0}, 1)
    ring.drain()
    assert ring.scheduler.snapshot().parked == 1
    assert ring.tokens("small") == reference(prompt(300), 0, 50, frozenset())
    assert ring.scheduler.expire(now=ring.now + 599) == []
    ring.reform({0: 0}, 2)
    ring.drain()
    assert ring.tokens("large") == reference(prompt(1200, 1), 0, 50, frozenset())


def test_a_request_parked_too_long_fails_and_gives_its_room_back() -> None:
    ring = Ring(ranks=2, capacity=1000)
    ring.submit("large", prompt(1400), max_tokens=50)
    while not ring.tokens("large"):
        ring.step()
    ring.reform({0: 0}, 1)
    assert ring.step() is None
    events = ring.scheduler.expire(now=ring.now + 600)
    assert [type(event) for event in events] == [Failed]
    assert isinstance(events[0], Failed)
    assert events[0].refusal.code == "ring_too_small"
    assert ring.scheduler.snapshot().active == (0,)


def test_of_two_that_keep_each_other_waiting_the_more_urgent_goes_on_and_the_other_is_computed_anew() -> None:
    ring = Ring(ranks=2, capacity=1000)
    ring.submit("a", prompt(850), max_tokens=20)
    ring.submit("b", prompt(850, 1), max_tokens=20)
    while not ring.tokens("b"):
        ring.step()
    ring.reform({0: 0}, 1)
    assert ring.scheduler.snapshot().parked == 2
    ring.step()
    assert ring.scheduler.snapshot().parked == 1
    ring.drain()
    assert ring.tokens("a") == reference(prompt(850), 0, 20, frozenset())
    assert ring.tokens("b") == reference(prompt(850, 1), 0, 20, frozenset())
    ended = [event.request for event in ring.events if isinstance(event, Ended)]
    assert ended == ["a", "b"]
    assert ring.scheduler.snapshot().counts["parked_requests"] == 2


def test_who_waits_for_room_goes_before_who_comes() -> None:
    ring = Ring(ranks=2, capacity=1000)
    ring.submit("a", prompt(850), max_tokens=20)
    ring.submit("b", prompt(850, 1), max_tokens=20)
    while not ring.tokens("b"):
        ring.step()
    ring.reform({0: 0}, 1)
    refusal = ring.submit("c", prompt(20, 2))
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.code) == (429, "kv_cache_full")
    assert refusal.message.startswith("Requests that lost their room with a rank go first")
    ring.drain()
    assert isinstance(ring.submit("c", prompt(20, 2)), Accepted)


def test_who_waits_for_a_rank_holds_up_nobody() -> None:
    ring = Ring(ranks=2, capacity=1000)
    ring.submit("large", prompt(1200), max_tokens=50)
    while not ring.tokens("large"):
        ring.step()
    ring.reform({0: 0}, 1)
    assert isinstance(ring.submit("small", prompt(100, 1)), Accepted)
    ring.drain()
    assert ring.tokens("small") == reference(prompt(100, 1), 0, 4, frozenset())
    assert ring.scheduler.snapshot().parked == 1


def test_what_fits_the_whole_ring_is_not_refused_for_good_while_a_rank_is_away() -> None:
    ring = Ring(ranks=2, capacity=1000)
    ring.reform({0: 0}, 1)
    refusal = ring.submit("a", prompt(1500))
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.reason, refusal.retry_after_seconds) == (429, "kv", 30)
    assert "fits the whole ring of 2 ranks, and only 1 are there now" in refusal.message
    ring.reform({0: 0}, 2)
    assert isinstance(ring.submit("a", prompt(1500)), Accepted)


def test_one_that_fills_the_ring_is_computed_anew_when_a_rank_comes_back_empty() -> None:
    ring = Ring(ranks=2, capacity=1000)
    ring.submit("a", prompt(1800), max_tokens=20)
    while not ring.tokens("a"):
        ring.step()
    ring.reform({0: 0}, 1)
    assert ring.step() is None
    ring.reform({0: 0}, 2)
    ring.drain()
    assert ring.tokens("a") == reference(prompt(1800), 0, 20, frozenset())


def test_a_parked_request_goes_on_when_the_one_before_it_is_cancelled() -> None:
    ring = Ring(ranks=2, capacity=1000)
    ring.submit("first", prompt(300), max_tokens=600)
    ring.submit("second", prompt(850, 1), max_tokens=20)
    while not ring.tokens("second"):
        ring.step()
    ring.reform({0: 0}, 1)
    ring.step()
    assert ring.scheduler.snapshot().parked == 1
    ring.scheduler.cancel("second")
    ring.drain()
    assert ring.tokens("first") == reference(prompt(300), 0, 600, frozenset())


def test_a_request_is_parked_no_longer_than_allowed_however_often_the_ring_changes() -> None:
    ring = Ring(ranks=3, capacity=1000)
    ring.submit("large", prompt(2400), max_tokens=50)
    while not ring.tokens("large"):
        ring.step()
    lost = ring.now
    ring.reform({0: 0, 1: 1}, 2)
    ring.now += 400
    ring.reform({0: 0, 1: 1}, 2)
    assert ring.scheduler.expire(now=lost + 599) == []
    assert [type(event) for event in ring.scheduler.expire(now=lost + 600)] == [Failed]
    assert ring.scheduler.snapshot().counts["parked_requests"] == 1


def test_a_new_rank_0_finds_what_the_workers_hold() -> None:
    ring = Ring()
    ring.submit("a", prompt(2000), max_tokens=50)
    while len(ring.tokens("a")) < 10:
        ring.step()
    ring.reform({1: 1, 2: 2, 3: 3}, 4)
    tables = ring.scheduler.tables()
    ring.scheduler = Scheduler(policy=POLICY, ranks=4, whole=4, capacity=10_000, uniform=lambda: 0.5)
    ring.scheduler.restore(tables, ranks=4)
    ring.events = []
    accepted = ring.submit("a", prompt(2000), max_tokens=50)
    assert isinstance(accepted, Accepted)
    assert accepted.cached_tokens >= 1490
    ring.drain()
    assert ring.tokens("a") == reference(prompt(2000), 0, 50, frozenset())


def test_a_request_without_a_token_ends_alone_and_kv_in_doubt_is_not_used_again() -> None:
    ring = Ring()
    for name, seed in (("source", 0), ("other", 1)):
        ring.submit(name, prompt(200, seed))
        ring.drain()
    assert ring.submit("a", [*prompt(100), 7, 7, 7], max_tokens=20) == Accepted("a", 100, 20)
    ring.submit("b", prompt(200, 2), max_tokens=20)
    while not (ring.tokens("a") and ring.tokens("b")):
        ring.step()
    step = ring.scheduler.plan(epoch=0, number=len(ring.steps), now=ring.now)
    assert step is not None
    drawn = sampled(ring.scheduler, step, ring.ranks.run(step))
    (doubtful,) = (decode.sequence for decode in step.decode if decode.position < 200)
    del drawn[doubtful]
    refusal = Refusal(500, "not_finite", "The model computed nonsense.")
    events = ring.scheduler.complete(step, drawn, seconds=0.01, failed={doubtful: refusal})
    assert [event for event in events if isinstance(event, Failed)] == [Failed("a", refusal)]
    assert ring.scheduler.snapshot().kept == 1
    ring.events += events
    ring.drain()
    assert ring.tokens("b") == reference(prompt(200, 2), 0, 20, frozenset())
    assert ring.submit("c", prompt(200)) == Accepted("c", 0, 4)
    assert ring.submit("d", prompt(200, 1)) == Accepted("d", 199, 4)


def test_one_output_without_a_token_ends_its_whole_request() -> None:
    ring = Ring()
    ring.submit("a", prompt(200), max_tokens=20, outputs=3)
    while not ring.tokens("a", 2):
        ring.step()
    step = ring.scheduler.plan(epoch=0, number=len(ring.steps), now=ring.now)
    assert step is not None
    ring.ranks.run(step)
    refusal = Refusal(500, "not_finite", "The model computed nonsense.")
    failed = {draw.sequence: refusal for draw in ring.scheduler.draws(step)}
    assert len(failed) > 1
    assert ring.scheduler.complete(step, {}, seconds=0.01, failed=failed) == [Failed("a", refusal)]
    assert ring.scheduler.snapshot().held == (0, 0, 0, 0)


def test_two_requests_of_one_name_are_a_mistake() -> None:
    ring = Ring()
    ring.submit("a", prompt(10))
    with pytest.raises(ValueError, match="in progress already"):
        ring.submit("a", prompt(10))
