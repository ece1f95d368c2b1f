"""The simulated engine's rules on cases made by hand, and invariants on any load."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.engine.blocks import Removed, Stored
from bench.engine.model import Batch, Engine, EngineConfig, Request, StepTime, prompt_hashes, shared_prefix


def engine(
    *, blocks: int = 9, block_size: int = 4, seqs: int = 8, budget: int = 64, longest: int = 32, caching: bool = True,
    events: bool = False,
) -> Engine:  # fmt: skip
    config = EngineConfig(
        num_gpu_blocks=blocks, block_size=block_size, max_num_seqs=seqs, max_num_batched_tokens=budget,
        max_model_len=longest, enable_prefix_caching=caching,
    )  # fmt: skip
    return Engine(config, keep_events=events)


def request(name: str, prompt: int, output: int, prefix: tuple[int, ...] = ()) -> Request:
    return Request(name=name, prompt_tokens=prompt, output_tokens=output, prefix_hashes=prefix)


def step(simulated: Engine) -> Batch:
    batch = simulated.schedule()
    assert batch is not None
    simulated.complete(batch)
    return batch


def run(simulated: Engine) -> int:
    """Steps until nothing is left."""
    steps = 0
    while (batch := simulated.schedule()) is not None:
        simulated.complete(batch)
        steps += 1
    return steps


def names(requests: list[Request]) -> list[object]:
    return [each.name for each in requests]


def test_one_block_is_the_null_block_and_an_idle_engine_has_nothing_to_do() -> None:
    idle = engine(blocks=9)
    assert (idle.pool.usable, idle.pool.free, idle.pool.usage) == (8, 8, 0.0)
    assert idle.schedule() is None


def test_a_prompt_and_its_first_token_take_one_step_each_further_token_another() -> None:
    simulated = engine()
    alone = request("a", 6, 3)
    simulated.add(alone)
    first = simulated.schedule()
    assert first is not None
    assert (first.prefill_tokens, first.decodes, first.context_tokens) == (6, 0, 0)
    assert simulated.pool.free == 6, "6 tokens in blocks of 4"
    given_out = simulated.complete(first)
    assert names(given_out.tokens) == ["a"]
    second = simulated.schedule()
    assert second is not None
    assert (second.prefill_tokens, second.decodes, second.context_tokens) == (0, 1, 6)
    simulated.complete(second)
    assert names(simulated.complete(step_of(simulated)).finished) == ["a"]
    assert simulated.pool.free == 8
    assert (simulated.counters.prompt_tokens, simulated.counters.generation_tokens) == (6, 3)


def step_of(simulated: Engine) -> Batch:
    batch = simulated.schedule()
    assert batch is not None
    return batch


def test_a_prompt_is_cut_where_the_budget_ends_and_running_requests_come_first() -> None:
    simulated = engine(budget=8)
    simulated.add(request("a", 4, 9))
    step(simulated)
    simulated.add(request("b", 12, 1))
    batch = step_of(simulated)
    assert names(batch.requests) == ["a", "b"]
    assert (batch.decodes, batch.prefill_tokens) == (1, 7)
    assert names(simulated.complete(batch).tokens) == ["a"], "a chunk gives no token"
    assert names(simulated.complete(step_of(simulated)).tokens) == ["a", "b"]


def test_the_queue_is_first_come_first_served_and_nobody_overtakes_who_does_not_fit() -> None:
    simulated = engine(blocks=9, caching=False)
    for each in (request("a", 16, 2), request("large", 20, 2), request("small", 4, 2)):
        simulated.add(each)
    assert names(step_of(simulated).requests) == ["a"]
    assert names(list(simulated.waiting)) == ["large", "small"]


def test_at_most_max_num_seqs_run() -> None:
    simulated = engine(seqs=2)
    for name in "abc":
        simulated.add(request(name, 4, 4))
    assert names(step_of(simulated).requests) == ["a", "b"]


def test_the_whole_prompt_must_fit_although_its_first_chunk_would() -> None:
    simulated = engine(blocks=9, budget=8, caching=False)
    simulated.add(request("a", 8, 9))
    step(simulated)
    simulated.add(request("b", 25, 1))
    assert names(step_of(simulated).requests) == ["a"]


def full(simulated: Engine) -> tuple[Request, Request, Request]:
    """Three requests of 8 tokens that fill 6 of 8 blocks, and each wants one more with its first token of output."""
    requests = request("a", 8, 12), request("b", 8, 12), request("c", 8, 12)
    for each in requests:
        simulated.add(each)
    step(simulated)
    return requests


def test_the_newest_running_request_is_preempted_and_goes_to_the_front_of_the_queue() -> None:
    simulated = engine(blocks=9, caching=False)
    a, _, c = full(simulated)
    simulated.add(request("d", 4, 1))
    batch = step_of(simulated)
    assert names(batch.preempted) == ["c"], "a and b took the last two blocks"
    assert names(batch.requests) == ["a", "b"]
    assert names(list(simulated.waiting)) == ["c", "d"], "nobody is let in, in a step that preempted"
    assert (c.computed, c.generated, c.preemptions, a.preemptions) == (0, 1, 1, 0)
    assert simulated.counters.num_preemptions == 1
    simulated.complete(batch)
    run(simulated)
    assert c.generated == 12
    assert simulated.counters.recomputed_tokens >= 8


def test_a_request_may_be_its_own_victim() -> None:
    simulated = engine(blocks=9, budget=64, caching=False)
    a, b = request("a", 16, 9), request("b", 16, 9)
    simulated.add(a)
    simulated.add(b)
    step(simulated)
    batch = step_of(simulated)
    assert names(batch.preempted) == ["b"], "the first took b's blocks"
    simulated.complete(batch)
    single = engine(blocks=9, caching=False)
    first, second = request("a", 15, 9), request("b", 16, 9)
    single.add(first)
    single.add(second)
    step(single)
    batch = step_of(single)
    assert names(batch.preempted) == ["b"], "a had room; b asked for a ninth block and is the last itself"
    assert names(batch.requests) == ["a"]


def test_what_a_preempted_request_computed_is_found_again_unless_it_was_evicted() -> None:
    simulated = engine(blocks=9)
    _, _, c = full(simulated)
    step(simulated)
    assert c.preemptions == 1
    assert simulated.pool.cached == 2, "its two full blocks"
    run(simulated)
    evicting = simulated.counters.recomputed_tokens
    roomy = engine(blocks=10)
    _, _, c = full(roomy)
    step(roomy)
    assert c.preemptions == 0
    assert evicting > 0


def test_a_prefix_is_found_but_its_last_token_is_computed_again() -> None:
    simulated = engine()
    prefix = shared_prefix(1, 8, 4)
    simulated.add(request("a", 8, 1, prefix))
    step(simulated)
    assert simulated.pool.cached == 2
    assert simulated.pool.usage == 0.0, "cached blocks count as free"
    simulated.add(request("b", 8, 1, prefix))
    batch = step_of(simulated)
    assert (batch.prefill_tokens, batch.context_tokens) == (4, 4), "one of the two blocks"
    assert (simulated.counters.prefix_cache_queries, simulated.counters.prefix_cache_hits) == (16, 4)


def test_two_requests_share_a_prefix_in_the_same_step() -> None:
    simulated = engine()
    prefix = shared_prefix(1, 8, 4)
    simulated.add(request("a", 10, 5, prefix))
    simulated.add(request("b", 10, 5, prefix))
    batch = step_of(simulated)
    assert batch.prefill_tokens == 12
    assert simulated.pool.free == 4, "two shared and one each"


def test_a_free_block_of_a_prefix_counts_as_taken_when_it_is_used_again() -> None:
    simulated = engine(blocks=9)
    prefix = shared_prefix(1, 16, 4)
    simulated.add(request("a", 16, 1, prefix))
    step(simulated)
    simulated.add(request("b", 16, 9))
    step(simulated)
    simulated.add(request("c", 20, 1, prefix))
    batch = step_of(simulated)
    assert names(batch.requests) == ["b"], "4 blocks are free; its prefix takes 4 and the rest 1"


def test_the_least_recently_used_prefix_is_evicted_from_its_end() -> None:
    simulated = engine(blocks=9, events=True)
    simulated.add(request("a", 8, 1, shared_prefix(1, 8, 4)))
    step(simulated)
    simulated.add(request("b", 8, 1, shared_prefix(2, 8, 4)))
    step(simulated)
    (one, two) = simulated.pool.take_events()
    assert isinstance(one, Stored)
    assert isinstance(two, Stored)
    assert (one.hashes, one.parent, one.first) == (shared_prefix(1, 8, 4), None, 0)
    simulated.add(request("c", 20, 1))
    step(simulated)
    removed = [each for each in simulated.pool.take_events() if isinstance(each, Removed)]
    assert [each.hash for each in removed] == [shared_prefix(1, 8, 4)[1]], "4 blank blocks first, then the tail of a"
    assert simulated.pool.evicted == 1


def test_an_event_names_the_block_before_it() -> None:
    simulated = engine(events=True)
    alone = request("a", 4, 5)
    simulated.add(alone)
    run(simulated)
    first, second = simulated.pool.take_events()
    assert isinstance(first, Stored)
    assert isinstance(second, Stored)
    assert second.parent == first.hashes[-1]
    assert (second.first, second.request) == (1, "a")


def test_a_twin_stays_findable_when_the_first_of_two_equal_blocks_is_evicted() -> None:
    simulated = engine(blocks=9)
    prefix = shared_prefix(1, 4, 4)
    for name in ("a", "b"):  # the last token is computed again, so each has a block of its own
        simulated.add(request(name, 4, 1, prefix))
    step(simulated)
    assert simulated.pool.cached == 2
    simulated.add(request("c", 28, 1))
    step(simulated)
    assert simulated.pool.evicted == 1
    assert len(simulated.pool.find(prefix)) == 1


def test_an_abort_frees_its_blocks_in_the_middle_of_a_step() -> None:
    simulated = engine()
    a, b = request("a", 8, 9), request("b", 8, 9)
    simulated.add(a)
    simulated.add(b)
    batch = step_of(simulated)
    simulated.abort(a)
    assert names(simulated.complete(batch).tokens) == ["b"]
    simulated.add(queued := request("c", 8, 9))
    simulated.abort(queued)
    simulated.abort(queued)
    simulated.abort(b)
    assert simulated.schedule() is None
    assert simulated.pool.free == 8


def test_a_request_ends_at_max_model_len() -> None:
    simulated = engine(longest=10)
    cut = request("a", 8, 99)
    simulated.add(cut)
    run(simulated)
    assert cut.generated == 2


def test_what_could_never_run_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="below max_model_len, 32, got 32"):
        engine().add(request("a", 32, 1))
    with pytest.raises(ValueError, match="at most what the KV cache holds, 12 tokens, got 32"):
        engine(blocks=4)


def test_prompts_are_equal_block_by_block_from_the_start() -> None:
    one, two = prompt_hashes([1, 2, 3, 4, 5], 2), prompt_hashes([1, 2, 9, 4, 5], 2)
    assert len(one) == 2
    assert one[0] == two[0]
    assert one[1] != two[1]
    assert prompt_hashes([9, 2, 3, 4], 2)[1] != one[1]


def test_the_time_of_a_step_is_linear() -> None:
    time = StepTime(base=1.0, per_prefill_token=0.1, per_decode=0.01, per_context_token=0.001)
    assert time.seconds(Batch(prefill_tokens=10, decodes=5, context_tokens=100)) == pytest.approx(2.15)


@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20), st.integers(0, 3)), min_size=1, max_size=25),
    blocks=st.integers(9, 20),
    seqs=st.integers(1, 10),
    budget=st.integers(4, 64),
    caching=st.booleans(),
    aborted=st.sets(st.integers(0, 24)),
)
def test_on_any_load_every_request_ends_and_every_block_comes_back(
    *, lengths: list[tuple[int, int, int]], blocks: int, seqs: int, budget: int, caching: bool, aborted: set[int]
) -> None:
    simulated = engine(blocks=blocks, seqs=seqs, budget=budget, caching=caching, events=True)
    requests = []
    for number, (prompt, output, family) in enumerate(lengths):
        made = request(str(number), prompt, output, shared_prefix(family, prompt, 4) if family else ())
        requests.append(made)
        simulated.add(made)
    steps = 0
    alive: dict[int, int] = {}
    while (batch := simulated.schedule()) is not None:
        steps += 1
        assert batch.requests, "an engine with requests always works"
        assert batch.prefill_tokens + batch.decodes <= budget
        assert len(simulated.running) <= seqs
        assert 0 <= simulated.pool.free <= simulated.pool.usable
        held = {block for each in simulated.running for block in each.blocks}
        assert len(held) == simulated.pool.usable - simulated.pool.free
        for event in simulated.pool.take_events():
            if isinstance(event, Stored):
                for each in event.hashes:
                    alive[each] = alive.get(each, 0) + 1
            else:
                alive[event.hash] -= 1
                assert alive[event.hash] >= 0
        if steps in aborted and steps < len(requests):
            simulated.abort(requests[steps])
        simulated.complete(batch)
        assert steps < 5000
    assert simulated.pool.free == simulated.pool.usable
    assert all(each.done for each in requests)
    for each, (prompt, output, _) in zip(requests, lengths, strict=True):
        assert each.generated <= min(output, 32 - prompt)
    if not caching:
        assert simulated.pool.cached == 0
