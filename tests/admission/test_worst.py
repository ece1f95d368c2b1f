"""``reservation: Worst`` makes preemption impossible, whatever requests do within what they declared."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kvplane_runtime.admission.controller import Admission
from kvplane_runtime.admission.demand import Demand, Entry, Feedback
from tests.admission.vllm_model import Engine, Sequence
from tests.admission.world import World, configuration


@st.composite
def requests(draw: st.DrawFn) -> tuple[int, int, int, list[int], int]:
    """Prompt, max_tokens, outputs, the true length of each output, and the step in which it comes."""
    prompt = draw(st.integers(1, 120))
    most = draw(st.integers(1, 80))
    lengths = draw(st.lists(st.integers(1, most), min_size=1, max_size=3))
    return prompt, most, len(lengths), lengths, draw(st.integers(0, 60))


def serve(
    coming: list[tuple[int, int, int, list[int], int]],
    *,
    reservation: str,
    lookahead: int = 0,
    batched_tokens: int = 64,
) -> tuple[Engine, int]:
    """Runs the requests through admission and the model; the engine at the end, and how many requests it finished."""
    engine = Engine(blocks=40, block_size=16, batched_tokens=batched_tokens, lookahead=lookahead)
    config = configuration(
        engine={"speculativeTokens": lookahead},
        admission={"reservation": reservation, "queue": {"maxWaitSeconds": 10_000, "maxRequests": 1_000}},
    )
    admission = Admission(config=config, uniform=lambda: 0.5)
    pending = sorted(coming, key=lambda request: request[-1])
    sequences: dict[Sequence, Entry] = {}
    lengths: dict[Entry, list[int]] = {}
    finished = 0

    def send(entry: Entry) -> None:
        for length in lengths[entry]:
            sequence = Sequence(entry.demand.prompt_tokens, length)
            sequences[sequence] = entry
            engine.waiting.append(sequence)

    step = 0
    while pending or sequences or admission.next_decision_at() is not None:
        now = step * 0.01
        admission.observe(
            Feedback(
                kv_blocks=engine.blocks,
                block_size_tokens=engine.block_size,
                max_model_len_tokens=engine.blocks * engine.block_size,
                kv_blocks_used=engine.used,
                preemptions_total=engine.preemptions,
            ),
            now=now,
        )
        while pending and pending[0][-1] <= step:
            prompt, most, outputs, own, _ = pending.pop(0)
            entry = admission.offer(Demand(prompt, outputs=outputs, max_output_tokens=most), now=now)
            lengths[entry] = own
            if entry.admitted_at is not None:
                send(entry)
        for entry in admission.decide(now=now):
            if entry.admitted_at is not None:
                send(entry)
        for sequence in engine.step():
            entry = sequences[sequence]
            admission.first_token(entry, now=now)
            admission.progress(entry, entry.generated + 1, now=now)
            if sequence.over:
                del sequences[sequence]
                if entry not in sequences.values():
                    admission.end(entry, now=now, completed=True)
                    finished += 1
        step += 1
        assert step < 100_000
    assert admission.state(now=step * 0.01).reserved_tokens == 0
    return engine, finished


@settings(max_examples=60, deadline=None)
@given(st.lists(requests(), min_size=1, max_size=25), st.integers(0, 5), st.sampled_from([16, 64, 1024]))
def test_nothing_is_ever_preempted(
    coming: list[tuple[int, int, int, list[int], int]], lookahead: int, batched_tokens: int
) -> None:
    engine, _ = serve(coming, reservation="Worst", lookahead=lookahead, batched_tokens=batched_tokens)
    assert engine.preemptions == 0


def test_the_model_preempts_what_was_let_in_by_expectation_only() -> None:
    """Otherwise the test above would show nothing."""
    taught = [(10, 80, 1, [2], step) for step in range(0, 400, 10)]
    liars = [(100, 80, 1, [80], 410) for _ in range(12)]
    engine, finished = serve(taught + liars, reservation="Expected")
    assert engine.preemptions > 0
    assert finished == len(taught) + len(liars)
    assert serve(taught + liars, reservation="Worst")[0].preemptions == 0


def test_who_finds_all_reserved_comes_back_when_a_request_is_expected_to_have_ended() -> None:
    """A reservation stays whole until its request ends, so it is the end that is waited for, and it comes nearer."""
    world = World(configuration(admission={"reservation": "Worst", "queue": {"maxRequests": 0}}))
    world.scrape()
    running = world.offer(1000, max_output_tokens=1000)
    assert running.admitted_at is not None
    early = world.offer(1000, max_output_tokens=1000)
    world.run(running, 900, seconds_per_token=0.05)
    late = world.offer(1000, max_output_tokens=1000)
    assert early.refusal is not None
    assert late.refusal is not None
    assert early.refusal.retry_after_seconds is not None
    assert late.refusal.retry_after_seconds is not None
    # 439 and 91 tokens of 50 ms are to come, by the expectation before anything is known; spread by 0.8 to 1.3.
    assert 18 <= early.refusal.retry_after_seconds <= 29
    assert 4 <= late.refusal.retry_after_seconds <= 6


def test_before_a_rate_is_known_the_queue_needs_room_too() -> None:
    """What is refused fits now beside what runs, but others wait before it: told to come back at once it would be in vain."""
    world = World(configuration(admission={"reservation": "Worst", "queue": {"maxRequests": 3}}))
    world.scrape()
    running = world.offer(1000, max_output_tokens=1000)
    waiting = [world.offer(100, max_output_tokens=1900), *(world.offer(200, max_output_tokens=200) for _ in range(2))]
    refused = world.offer(300, max_output_tokens=100).refusal
    assert running.admitted_at is not None
    assert all(entry.admitted_at is None and entry.refusal is None for entry in waiting)
    assert refused is not None
    assert refused.retry_after_seconds is not None
    assert 18 <= refused.retry_after_seconds <= 29
