"""The life of a request through the gates, and what changes them."""

import random

import pytest

from kvplane_runtime.admission.controller import CHECK_SECONDS, Admission
from kvplane_runtime.admission.demand import Demand, Entry, Feedback, Reason
from tests.admission.world import BLOCK_SIZE, BLOCKS, World, configuration


def refusal(entry: Entry, reason: Reason) -> str:
    """The message of a refusal for that reason."""
    assert entry.refusal is not None
    assert entry.refusal.reason is reason
    return entry.refusal.message


def waits(entry: Entry) -> bool:
    return entry.admitted_at is None and entry.refusal is None


@pytest.fixture
def world() -> World:
    world = World()
    world.scrape()
    return world


def with_(**sections: object) -> World:
    world = World(configuration(**sections))
    world.scrape()
    return world


# Never fits.


def test_an_idle_engine_lets_a_request_in_at_once(world: World) -> None:
    assert world.offer().admitted_at == world.now


def test_a_prompt_beyond_the_context_is_refused_for_good() -> None:
    world = World()
    world.scrape(max_model_len_tokens=1000)
    entry = world.offer(1000)
    assert "1000 tokens and the engine's context holds 1000" in refusal(entry, Reason.CONTEXT)
    assert entry.refusal is not None
    assert entry.refusal.retry_after_seconds is None
    assert world.offer(999).admitted_at is not None


def test_a_prompt_beyond_the_hard_cap_is_refused_for_good(world: World) -> None:
    message = refusal(world.offer(90 * BLOCK_SIZE + 1), Reason.CONTEXT)
    assert "at most 2880 tokens (95 % of 95 blocks of 32)" in message
    assert world.offer(90 * BLOCK_SIZE).admitted_at is not None


def test_the_hard_cap_is_a_setting() -> None:
    world = with_(admission={"kvHardCapPercent": 50})
    refusal(world.offer(48 * BLOCK_SIZE), Reason.CONTEXT)
    assert world.offer(47 * BLOCK_SIZE).admitted_at is not None


def test_what_turns_out_never_to_fit_is_not_kept_waiting() -> None:
    world = with_(engine={"maxSequences": 1})
    world.offer()
    waiting = world.offer(2000)
    assert waits(waiting)
    world.scrape(max_model_len_tokens=1500)
    assert world.decide() == [waiting]
    refusal(waiting, Reason.CONTEXT)


# The gates.


def test_gate_c_counts_prompts_and_outputs_so_far(world: World) -> None:
    first = world.offer(1600)
    world.run(first, 200)  # 57 of the 90 blocks
    assert waits(world.offer(34 * BLOCK_SIZE))
    assert world.offer(100, max_output_tokens=8).admitted_at is not None


def test_gate_a_expects_what_outputs_have_shown(world: World) -> None:
    world.teach(output_tokens=1000)
    most = 0
    while world.offer().admitted_at is not None:
        most += 1
    world = World()
    world.scrape()
    world.teach(output_tokens=10)
    more = 0
    while world.offer().admitted_at is not None:
        more += 1
    assert 2 <= most <= 4
    assert more >= 4 * most


def test_gate_a_knows_what_a_request_may_ask_for_at_most(world: World) -> None:
    world.teach(output_tokens=1000)
    admitted = 0
    while world.offer(max_output_tokens=10).admitted_at is not None:
        admitted += 1
    assert admitted > 15


def test_room_that_comes_free_is_given_at_once(world: World) -> None:
    first = world.offer(2000)
    second = world.offer(2000)
    assert waits(second)
    world.finish(first)
    assert world.admission.next_decision_at() == world.now
    assert world.decide() == [second]
    assert second.admitted_at == world.now


def test_gate_b_keeps_prompts_that_the_engine_would_only_queue() -> None:
    world = with_(engine={"maxBatchedTokens": 300})
    first = world.offer(200)
    assert world.offer(100).admitted_at is not None
    third = world.offer(10)
    assert waits(third)
    world.run(first, 1)
    assert world.decide() == [third]


def prefilling(world: World) -> None:
    """Has seen that a prompt token takes 1 ms."""
    for tokens in (200, 400, 600, 800) * 5:
        entry = world.offer(tokens)
        world.now += 0.001 * tokens
        world.admission.first_token(entry, now=world.now)
        world.finish(entry, 1)


def test_gate_b_lets_a_burst_through_that_is_in_time_in_any_order() -> None:
    """With 100 ms promised for a token, the engine gets 200 prompt tokens at a time, and 800 while nobody would be late."""
    world = with_(slo={"ttftMilliseconds": 2000, "tpotMilliseconds": 105})
    prefilling(world)
    burst = [world.offer(100) for _ in range(9)]
    assert [entry.admitted_at is not None for entry in burst] == [True] * 7 + [False] * 2


def test_gate_b_keeps_order_where_not_all_are_in_time() -> None:
    world = with_(slo={"ttftMilliseconds": 500, "tpotMilliseconds": 105})
    prefilling(world)
    burst = [world.offer(100) for _ in range(9)]
    assert [entry.admitted_at is not None for entry in burst] == [True] * 5 + [False] * 4
    world.pass_seconds(0.1)
    world.run(burst[0], 1)
    assert world.decide() == [], "four are under way, and five more would not all be in time"


def test_what_would_be_late_behind_what_is_under_way_is_not_sent() -> None:
    world = with_(slo={"ttftMilliseconds": 1000, "tpotMilliseconds": 105}, engine={"maxSequences": 2})
    prefilling(world)
    first, second = world.offer(100), world.offer(100)
    late, other = world.offer(100), world.offer(50)
    world.pass_seconds(0.85)
    world.run(first, 1)
    world.finish(first)  # a place is free, and the 100 tokens before it take 0.1 s, too long with its own 0.1
    world.decide()
    assert "prompts that came before are still being computed" in refusal(late, Reason.PREFILL)
    assert second.first_token_at is None
    assert other.refusal is None


def test_the_engines_own_limit_of_sequences() -> None:
    world = with_(engine={"maxSequences": 5})
    assert world.offer(outputs=4).admitted_at is not None
    assert waits(world.offer(outputs=2))
    assert world.offer(10).admitted_at is not None
    assert waits(world.offer(10))


def busy(world: World, *, requests: int, seconds_per_token: float, seconds: float) -> list[Entry]:
    """Runs so many endless outputs side by side, with the windows of the pace closed on the way."""
    entries = [world.offer(10) for _ in range(requests)]
    assert all(entry.admitted_at is not None for entry in entries)
    for entry in entries:
        world.admission.first_token(entry, now=world.now)
    for _ in range(round(seconds / seconds_per_token)):
        world.now += seconds_per_token
        for entry in entries:
            world.admission.progress(entry, entry.generated + 1, now=world.now)
        world.decide()
    return entries


def test_no_more_sequences_run_than_keep_the_promised_pace() -> None:
    """A step takes 10 ms and 4 ms for each sequence; 50 ms are promised, so ten and more would break it."""
    world = World(configuration(slo={"tpotMilliseconds": 50}))
    world.scrape(kv_blocks=10_000)
    for requests in (1, 2, 4, 8, 3, 6):
        for entry in busy(world, requests=requests, seconds_per_token=0.010 + 0.004 * requests, seconds=3.0):
            world.finish(entry)
    admitted = 0
    while (entry := world.offer(10)).admitted_at is not None:
        admitted += 1
        world.admission.first_token(entry, now=world.now)
    assert 7 <= admitted <= 10
    assert waits(entry)


def test_counts_that_come_late_do_not_make_the_engine_look_slow() -> None:
    """A step takes 12.5 ms, and tokens are counted four times a second; 19 ms are promised."""
    world = World(configuration(slo={"tpotMilliseconds": 19}))
    world.scrape(kv_blocks=10_000)
    for _ in range(12):
        entries = [world.offer(10) for _ in range(4)]
        for entry in entries:
            world.admission.first_token(entry, now=world.now)
        for _ in range(4):
            world.now += 0.25
            for entry in entries:
                world.admission.progress(entry, entry.generated + 20, now=world.now)
        for entry in entries:
            world.finish(entry)
    for _ in range(5):
        assert world.offer(10).admitted_at is not None


def test_a_long_prompt_waits_for_short_outputs_beside_it() -> None:
    world = World(configuration(slo={"tpotMilliseconds": 50, "ttftMilliseconds": 4000}))
    world.scrape(kv_blocks=10_000)
    for tokens in (200, 400, 600, 800) * 10:  # 1 ms for each prompt token, outputs of 12
        entry = world.offer(tokens)
        world.now += 0.001 * tokens
        world.run(entry, 12, seconds_per_token=0.02)
        world.finish(entry)
    short = world.offer(100)
    world.now += 0.1
    world.run(short, 5, seconds_per_token=0.02)
    long = world.offer(800)  # 0.8 s would make 12 tokens take 1 s, and 0.6 s are promised
    assert waits(long)
    world.run(short, 7, seconds_per_token=0.02)
    world.finish(short)
    assert world.decide() == [long]
    assert long.admitted_at is not None


def test_a_promise_that_a_lone_request_breaks_does_not_make_the_engine_serve_one_at_a_time() -> None:
    world = World(configuration(slo={"ttftMilliseconds": 60_000, "tpotMilliseconds": 50}))
    world.scrape()
    pair = [world.offer(max_output_tokens=60) for _ in range(2)]
    for _ in range(60):  # together 0.12 s a token
        for entry in pair:
            world.run(entry, 1, seconds_per_token=0.06)
        world.decide()
    for entry in pair:
        world.finish(entry, 60)
    alone = world.offer(max_output_tokens=60)
    for _ in range(60):
        world.run(alone, 1, seconds_per_token=0.1)
        world.decide()
    world.finish(alone, 60)
    together = [world.offer(max_output_tokens=60) for _ in range(3)]
    assert sum(entry.admitted_at is not None for entry in together) > 1


# Waiting and being refused.


def test_what_finds_no_room_in_time_is_refused(world: World) -> None:
    world.run(world.offer(2000), 10)
    late = world.offer(2000)
    world.pass_seconds(1.9)
    assert waits(late)
    world.pass_seconds(0.2)
    message = refusal(late, Reason.KV)
    assert message.startswith("There was no room within 2.0 s (the engine's KV cache is taken); retry in ")
    assert world.admission.next_decision_at() is None


def test_the_longest_wait_is_a_setting() -> None:
    world = with_(admission={"queue": {"maxWaitSeconds": 7}})
    world.offer(2000)
    late = world.offer(2000)
    world.pass_seconds(6.9)
    assert waits(late)
    world.pass_seconds(0.2)
    refusal(late, Reason.KV)


def test_its_own_prefill_is_part_of_the_time(world: World) -> None:
    prefilling(world)
    world.offer(2000)
    late = world.offer(900)
    world.pass_seconds(1.0)
    assert waits(late)
    world.pass_seconds(0.2)
    assert late.refusal is not None


def test_no_queue_refuses_what_cannot_start() -> None:
    world = with_(admission={"queue": {"maxRequests": 0}})
    world.offer(2000)
    assert "no queue" in refusal(world.offer(2000), Reason.KV)


def test_a_full_queue() -> None:
    world = with_(admission={"queue": {"maxRequests": 2}}, engine={"maxSequences": 1})
    world.offer()
    for _ in range(2):
        assert waits(world.offer())
    assert "2 requests wait already" in refusal(world.offer(), Reason.QUEUE_FULL)


def test_a_crowd_gives_way_in_a_full_queue() -> None:
    world = with_(admission={"queue": {"maxRequests": 3}, "fairness": {"header": "x"}}, engine={"maxSequences": 1})
    world.offer(tenant="crowd")
    crowd = [world.offer(tenant="crowd") for _ in range(3)]
    other = world.offer(tenant="other")
    assert waits(other)
    assert world.admission.next_decision_at() == world.now
    assert world.decide() == [crowd[-1]]
    refusal(crowd[-1], Reason.QUEUE_FULL)


def test_a_policy_that_only_observes_takes_nobody_out_of_the_queue() -> None:
    admission = {"queue": {"maxRequests": 3}, "fairness": {"header": "x"}}
    world = with_(admission=admission, engine={"maxSequences": 1})
    world.offer(tenant="crowd")
    crowd = [world.offer(tenant="crowd") for _ in range(3)]
    observing = configuration(admission=admission | {"policy": "Observe"}, engine={"maxSequences": 1})
    world.admission.configure(observing)
    assert world.offer(tenant="other").would_refuse is None
    assert world.decide() == crowd
    assert all(entry.admitted_at is not None for entry in crowd)


def test_bytes_that_wait_are_bounded() -> None:
    world = with_(engine={"maxSequences": 1})
    world.offer()
    assert waits(world.offer(prompt_bytes=100 * 1024 * 1024))  # alone in the queue, whatever its size
    refusal(world.offer(prompt_bytes=1), Reason.QUEUE_FULL)


def test_what_waits_in_vain_is_refused_early() -> None:
    world = with_(engine={"maxSequences": 1}, admission={"queue": {"maxWaitSeconds": 4}})
    running = world.offer(1000)
    refused_early = []
    for _ in range(40):  # a second for each: 1,000 prompt tokens per second
        entries = [world.offer(1000) for _ in range(4)]
        refused_early += [entry for entry in entries if entry.refusal and entry.refusal.reason is Reason.DEADLINE]
        world.pass_seconds(1.0)
        world.finish(running, 5)
        running = next(entry for entry in world.decide() if entry.admitted_at is not None)
    assert len(refused_early) > 20
    assert "prompt tokens wait before it, too many for its time" in refusal(refused_early[-1], Reason.DEADLINE)
    assert refused_early[-1].refusal is not None
    assert refused_early[-1].refusal.retry_after_seconds is not None
    assert refused_early[-1].refusal.retry_after_seconds >= 3


def one_a_second() -> World:
    """An engine that has served one request of 1,000 prompt tokens a second while others waited, and has another one now."""
    world = with_(engine={"maxSequences": 1}, admission={"queue": {"maxWaitSeconds": 4}})
    running = world.offer(1000)
    for _ in range(30):
        world.offer(1000)
        world.pass_seconds(1.0)
        world.finish(running, 5)
        (running,) = world.decide()
    return world


def test_what_waits_is_refused_when_too_much_has_come_before_it() -> None:
    world = one_a_second()
    long = world.offer(2000)
    first_look = world.admission.next_decision_at()
    assert first_look == world.now + CHECK_SECONDS
    world.pass_seconds(0.1)
    short = [world.offer(750) for _ in range(7)]  # each goes before the long one, and all of them take five seconds
    world.decide()
    assert all(waits(entry) for entry in (long, *short)), "nobody looks before the next look is due"
    world.pass_seconds(CHECK_SECONDS)
    assert "5250 prompt tokens wait before it, too many for its time" in refusal(long, Reason.DEADLINE)
    assert all(waits(entry) for entry in short)


def test_what_waits_is_refused_when_the_engine_no_longer_gets_to_it() -> None:
    world = one_a_second()
    first, second = world.offer(1000), world.offer(1001)
    assert waits(first)
    assert waits(second)
    while waits(second):
        world.pass_seconds(CHECK_SECONDS)
    assert second.arrived_at + 2 < world.now < second.arrived_at + 4
    assert "1000 prompt tokens wait before it" in refusal(second, Reason.DEADLINE)
    assert waits(first), "nothing is before it"


def test_a_client_that_leaves_the_queue_leaves_nothing(world: World) -> None:
    world.offer(2000)
    gone = world.offer(2000)
    world.admission.end(gone, now=world.now, completed=False)
    assert world.admission.state(now=world.now).queued == 0
    assert world.admission.next_decision_at() is None


def test_a_tenant_beyond_its_tokens_per_second() -> None:
    world = with_(admission={"fairness": {"header": "x-tenant", "tokensPerSecond": 10}})
    entry = world.offer(500, tenant="a", max_output_tokens=500)
    world.run(entry, 500, seconds_per_token=0.001)
    world.finish(entry, 500)
    late = world.offer(10, tenant="a")
    assert "more than its 10 tokens per second" in refusal(late, Reason.TENANT)
    assert late.refusal is not None
    assert late.refusal.retry_after_seconds == 30
    assert world.offer(10, tenant="b").admitted_at is not None
    world.now += 41
    assert world.offer(10, tenant="a").admitted_at is not None


# Priorities.


def priorities(**admission: object) -> World:
    return with_(admission={"priorities": ["chat", "batch"], "queue": {"maxWaitSeconds": 100}, **admission})


def fill(world: World, *, priority: int) -> int:
    admitted = 0
    while world.offer(priority=priority).admitted_at is not None:
        admitted += 1
    return admitted


def test_a_lower_class_leaves_room_for_the_higher() -> None:
    first, second = priorities(), priorities()
    for world in (first, second):
        world.teach(output_tokens=100)
    batch = fill(first, priority=1)
    assert fill(first, priority=0) > 0
    assert batch < fill(second, priority=0)


def test_a_lower_class_does_not_starve() -> None:
    """There is always one of the higher class that wants what comes free."""
    world = priorities(queue={"maxWaitSeconds": 20})
    world.teach(output_tokens=10, prompt_tokens=800)
    batch: list[Entry] = []
    running: list[Entry] = []
    for second in range(120):
        came = [world.offer(800) for _ in range(2)]
        if second % 10 == 0:
            batch.append(world.offer(800, priority=1))
        world.pass_seconds(0.5)
        running += [entry for entry in (*world.decided, *came) if entry.admitted_at is not None]
        world.decided.clear()
        world.run(running[0], 10, seconds_per_token=0.05)
        world.finish(running.pop(0))
        world.decide()
    waited = [entry.admitted_at - entry.arrived_at for entry in batch if entry.admitted_at is not None]
    assert len(waited) >= 3
    assert min(waited[1:]) == pytest.approx(16)  # 0.8 of its time


# The engine refuses itself.


def test_the_engines_own_refusal_is_tried_once_more(world: World) -> None:
    entry = world.offer()
    world.admission.requeue(entry, now=world.now)
    assert waits(entry)
    assert world.admission.state(now=world.now).reserved_tokens == 0
    world.pass_seconds(0.3)
    assert world.decided == [entry]
    assert entry.admitted_at is not None
    world.admission.requeue(entry, now=world.now)
    assert "The engine refused it twice" in refusal(entry, Reason.QUEUE_FULL)


# Rings.


def test_a_ring_decides_on_its_own_room() -> None:
    world = World(ring=True)
    world.scrape()
    entries = [world.offer(90 * BLOCK_SIZE) for _ in range(5)] + [world.offer(1_000_000)]
    assert all(entry.admitted_at == world.now for entry in entries)
    state = world.admission.state(now=world.now)
    assert (state.running, state.kv_peak_ratio, state.kappa) == (6, None, 1.0)


def test_what_a_ring_turns_away_holds_nothing_and_counts_as_refused() -> None:
    world = World(configuration(admission={"fairness": {"tokensPerSecond": 1}}), ring=True)
    world.scrape()
    entry = world.offer(1000)
    world.admission.turned_away(entry, Reason.KV, now=world.now)
    world.admission.turned_away(entry, Reason.KV, now=world.now)
    world.finish(entry, 5)
    state = world.admission.state(now=world.now)
    assert (state.running, state.reserved_tokens, state.admitted_total, state.refused_total) == (0, 0, 1, 1)
    assert state.shed_reservation_tokens_total > 1000
    assert world.admission.decisions["refused", Reason.KV] == 1
    assert world.offer(1000).admitted_at is not None, "the tenant has not paid for it"


def test_in_front_of_a_ring_a_long_prefill_holds_up_nobody() -> None:
    world = World(configuration(engine={"maxBatchedTokens": 300}), ring=True)
    world.scrape()
    assert world.offer(1_000_000).admitted_at is not None
    assert world.offer(10).admitted_at is not None


@pytest.mark.parametrize("policy", ["Enforce", "Observe"])
def test_in_front_of_a_ring_what_waited_for_its_place_goes_beside_a_long_prefill(policy: str) -> None:
    world = World(configuration(engine={"maxSequences": 2}, admission={"policy": policy}), ring=True)
    world.scrape()
    for _ in range(8):  # 10,000 prompt tokens a second
        entry = world.offer(1000)
        world.now += 0.1
        world.run(entry, 1)
        world.finish(entry, 1)
    assert world.offer(1_000_000).admitted_at is not None
    before, entry = world.offer(10), world.offer(10)
    assert (waits(entry), entry.would_refuse) == (policy == "Enforce", None)
    world.finish(before, 1)
    assert world.decide() == ([entry] if policy == "Enforce" else [])
    assert entry.admitted_at == world.now


def test_in_front_of_a_ring_sequences_and_tenants_are_bounded_as_everywhere() -> None:
    world = World(configuration(engine={"maxSequences": 1}, admission={"fairness": {"tokensPerSecond": 10}}), ring=True)
    world.scrape()
    first = world.offer(100, tenant="a")
    second = world.offer(100, tenant="b")
    assert waits(second)
    world.finish(first, 10)
    assert world.decide() == [second]
    world.finish(second, 10)
    world.finish(world.offer(1000, tenant="c"), 1)
    assert "more than its 10 tokens per second" in refusal(world.offer(1, tenant="c"), Reason.TENANT)


# Policies.


def test_observe_lets_everything_pass_and_counts() -> None:
    world = with_(admission={"policy": "Observe", "queue": {"maxRequests": 1}})
    entries = [world.offer(2000) for _ in range(3)] + [world.offer(10**6)]
    assert all(entry.admitted_at == world.now for entry in entries)
    assert [entry.would_refuse for entry in entries] == [None, Reason.KV, Reason.KV, Reason.CONTEXT]
    world.admission.configure(configuration(admission={"policy": "Observe", "queue": {"maxRequests": 0}}))
    assert world.offer(2000).would_refuse is Reason.KV
    assert world.admission.decisions["would-refuse", "kv"] == 3
    assert world.admission.decisions["would-refuse", "context-length"] == 1
    assert world.admission.decisions["admitted", ""] == 5


def test_observe_lets_pass_what_would_only_have_waited() -> None:
    world = with_(admission={"policy": "Observe"})
    world.teach(output_tokens=8)
    assert world.offer(2000, max_output_tokens=8).would_refuse is None
    second = world.offer(2000, max_output_tokens=8)
    assert second.admitted_at == world.now
    assert second.would_refuse is None  # the first is over within a second


def test_off_decides_nothing() -> None:
    world = with_(admission={"policy": "Off"})
    assert all(world.offer(10**6).admitted_at == world.now for _ in range(5))
    state = world.admission.state(now=world.now)
    assert set(state.model_dump(exclude={"policy", "kv_peak_ratio"}).values()) == {0}


@pytest.mark.parametrize("policy", ["Off", "Observe"])
def test_a_change_of_policy_lets_go_of_what_waits(world: World, policy: str) -> None:
    world.offer(2000)
    waiting = world.offer(2000)
    world.admission.configure(configuration(admission={"policy": policy}))
    due = world.admission.next_decision_at()
    assert due is not None
    assert due <= world.now
    assert world.decide() == [waiting]
    assert waiting.admitted_at == world.now


def test_limits_change_while_requests_run(world: World) -> None:
    world.offer(1000, max_output_tokens=10)
    world.admission.configure(configuration(admission={"kvHardCapPercent": 50}))
    assert waits(world.offer(600))
    world.admission.configure(configuration())
    world.pass_seconds(0.3)
    assert len(world.decided) == 1


def test_worst_reserves_all_that_may_come() -> None:
    world = with_(admission={"reservation": "Worst"})
    world.teach(output_tokens=5)
    assert world.offer(100, max_output_tokens=1500).admitted_at is not None
    assert world.admission.state(now=world.now).reserved_tokens == 50 * BLOCK_SIZE
    assert waits(world.offer(100, max_output_tokens=1500))
    assert world.offer(90, max_output_tokens=1000).admitted_at is not None
    assert "lower max_tokens or n" in refusal(world.offer(100, max_output_tokens=1500, outputs=2), Reason.CONTEXT)


# The engine's signals.


def test_an_unknown_capacity_neither_halts_nor_is_guessed() -> None:
    world = World(configuration(engine={"maxBatchedTokens": 10**6}))
    entries = [world.offer(100) for _ in range(300)]
    assert sum(entry.admitted_at is not None for entry in entries) == 256
    assert world.admission.state(now=world.now).kv_peak_ratio is None
    world.scrape(kv_blocks=10**6)
    assert len(world.decide()) == 44


def test_blocks_of_unknown_size_are_no_capacity() -> None:
    world = World()
    world.scrape(block_size_tokens=None)
    assert world.offer(2900).admitted_at is not None
    assert world.admission.state(now=world.now).kv_peak_ratio is None


def test_worst_without_a_capacity_lets_in_one_at_a_time() -> None:
    world = World(configuration(admission={"reservation": "Worst"}))
    assert world.offer().admitted_at is not None
    assert waits(world.offer())


def test_kv_of_requests_unknown_to_this_sidecar_is_respected() -> None:
    """It was restarted beside a busy engine."""
    world = World()
    world.scrape(kv_blocks_used=70)
    entry = world.offer(800)
    assert waits(entry)
    world.scrape(kv_blocks_used=20)
    assert world.decide() == [entry]


def test_a_scrape_a_moment_late_is_not_taken_for_others_kv(world: World) -> None:
    first = world.offer(1600)
    world.run(first, 1)
    world.scrape(kv_blocks_used=51)
    world.finish(first)
    world.scrape(kv_blocks_used=51)  # taken just before
    assert world.offer(2000).admitted_at is not None


def sharing(*, hits: float | None, thrashing: bool = False, preemptions: int = 0) -> int:
    """How many requests of 800 tokens run beside each other when the engine uses one's blocks for all."""
    world = World()
    world.scrape(preemptions_total=0)
    world.teach(output_tokens=5, prompt_tokens=800)
    for number in range(20):
        entry = world.offer(800)
        if entry.admitted_at is None:
            return number
        world.run(entry, 1)
        for _ in range(2):
            world.scrape(
                kv_blocks_used=25 + number, prefix_hit_ratio=hits, thrashing=thrashing, preemptions_total=preemptions
            )
    return 20


def test_shared_prefixes_count_once_where_hits_are_seen() -> None:
    assert sharing(hits=None) == 3
    assert sharing(hits=0.0) == 3
    assert sharing(hits=0.95) > 8


def test_shared_prefixes_do_not_count_in_trouble() -> None:
    assert sharing(hits=0.95, thrashing=True) == 3
    assert sharing(hits=0.95, preemptions=1) == 3


def kappa(world: World) -> float:
    return world.admission.state(now=world.now).kappa


def test_kappa_follows_preemptions(world: World) -> None:
    world.run(world.offer(2000), 1)
    world.scrape(preempted_tokens_total=0.0)
    world.scrape(preempted_tokens_total=500.0)
    assert kappa(world) == pytest.approx(1 - 0.5 * 500 / (BLOCKS * BLOCK_SIZE), abs=0.01)


def test_preemptions_alone_are_taken_as_of_the_youngest(world: World) -> None:
    world.run(world.offer(1000), 1)
    world.run(world.offer(300, max_output_tokens=20), 10)
    world.scrape(preemptions_total=3)
    world.scrape(preemptions_total=4)
    assert kappa(world) == pytest.approx(1 - 0.5 * 310 / (BLOCKS * BLOCK_SIZE), abs=0.01)


def test_kappa_is_frozen_without_the_metric(world: World) -> None:
    world.run(world.offer(2500), 1)
    for _ in range(10):
        world.scrape()
    assert kappa(world) == 1.0


def test_the_users_ceiling_on_kappa() -> None:
    world = with_(admission={"kvPeakPercent": 60})
    assert kappa(world) == 0.6


def test_stale_signals_leave_our_own_accounting() -> None:
    world = World()
    world.scrape(kv_blocks_used=95)
    assert waits(world.offer(500))
    world.admission.stale(now=world.now)
    assert len(world.decide()) == 1
    assert kappa(world) == 0.85
    world.scrape()
    assert kappa(world) == 1.0


def test_a_restarted_engine_is_filled_slowly(world: World) -> None:
    lost = world.offer(2000)
    world.admission.engine_restarted(now=world.now)
    assert kappa(world) == 0.5
    state = world.admission.state(now=world.now)
    assert (state.running, state.reserved_tokens) == (0, 0)
    world.finish(lost, 10)
    world.admission.progress(lost, 50, now=world.now)
    assert world.admission.state(now=world.now).reserved_tokens == 0
    world.now += 15
    assert kappa(world) == 0.75
    world.now += 15
    assert kappa(world) == 1.0


def test_sequences_unknown_to_this_sidecar_count_too() -> None:
    world = World(configuration(engine={"maxSequences": 8}))
    world.scrape(requests_running=7, requests_waiting=0)
    assert world.offer().admitted_at is not None
    assert waits(world.offer())
    world.scrape(requests_running=1, requests_waiting=0)
    assert len(world.decide()) == 1


# State.


def test_the_state_tells_what_is_held_and_what_was_sent_away(world: World) -> None:
    world.teach(output_tokens=100)
    running = world.offer(2000)
    queued = world.offer(1500)
    state = world.admission.state(now=world.now)
    assert (state.policy, state.running, state.queued, state.queued_prompt_tokens) == ("Enforce", 1, 1, 1500)
    assert state.queued_reservation_tokens == pytest.approx(1600, abs=10)
    assert state.reserved_tokens == pytest.approx(2100, abs=60)
    assert state.kv_peak_ratio == pytest.approx(2100 / (BLOCKS * BLOCK_SIZE), abs=0.03)
    assert (state.admitted_total, state.refused_total) == (41, 0)
    world.pass_seconds(3)
    state = world.admission.state(now=world.now)
    assert state.refused_total == 1
    assert state.shed_reservation_tokens_total == pytest.approx(1600, abs=10)
    world.finish(running)
    assert waits(queued) is False


def test_a_request_that_is_tried_again_and_refused_again_counts_again(world: World) -> None:
    """Nothing tells it from another one."""
    world.teach(output_tokens=100)
    running = world.offer(2000)
    for _ in range(2):
        world.offer(1500)
        world.pass_seconds(3)
    state = world.admission.state(now=world.now)
    assert state.refused_total == 2
    assert state.shed_reservation_tokens_total == pytest.approx(3200, abs=50)
    world.finish(running)


def test_what_no_room_would_help_is_no_demand() -> None:
    """A tenant's limit is the user's order: a scaler must not add replicas for what it refuses."""
    world = with_(admission={"fairness": {"tokensPerSecond": 10}})
    refusal(world.offer(90 * BLOCK_SIZE + 1), Reason.CONTEXT)
    world.finish(world.offer(1000, tenant="a"), 1)
    refusal(world.offer(1, tenant="a"), Reason.TENANT)
    state = world.admission.state(now=world.now)
    assert (state.refused_total, state.shed_reservation_tokens_total) == (0, 0)
    assert world.admission.decisions["refused", Reason.CONTEXT] == 1
    assert world.admission.decisions["refused", Reason.TENANT] == 1


def test_five_hundred_requests_in_flight_and_nothing_left_after() -> None:
    admission = Admission(config=configuration(engine={"maxBatchedTokens": 10**6}), uniform=lambda: 0.5)
    admission.observe(Feedback(kv_blocks=10**6, block_size_tokens=16), now=0.0)
    draws = random.Random(5)  # noqa: S311
    entries = [
        admission.offer(Demand(draws.randint(1, 4000), outputs=draws.randint(1, 3)), now=0.0) for _ in range(500)
    ]
    for entry in entries:
        admission.first_token(entry, now=1.0)
    for step in range(200):
        for entry in entries:
            admission.progress(entry, step + 1, now=1.0 + step / 20)
    assert admission.state(now=11.0).running == 500
    draws.shuffle(entries)
    for entry in entries:
        admission.end(entry, now=12.0, completed=True)
        admission.end(entry, now=12.0, completed=True)
    assert admission.state(now=12.0).reserved_tokens == 0
    assert admission.state(now=12.0).kv_peak_ratio == 0
