"""What holds after any sequence of requests, cancellations, broken steps and lost ranks.

The simulated ranks (:mod:`tests.ring.simulated`) check at every step that no rank is above its capacity and that each KV is
computed from the right ones; here is checked that every request ends, with its own tokens, and that nothing is left.
"""

import math
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvplane_runtime.ring.accounting import Reserve
from kvplane_runtime.ring.requests import Accepted, Ended, Policy
from tests.ring.simulated import Ring, prompt, reference

STOP = frozenset((3,))
MOST_STEPS = 20_000
SHARES = st.sampled_from([0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.95])
"""Of what the empty ring holds."""


class Traffic(RuleBasedStateMachine):
    """Requests with common prefixes come, are cancelled and end, on a ring that breaks and heals."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted: dict[str, tuple[list[int], int, int]] = {}
        self.cancelled: set[tuple[str, int]] = set()
        self.number = 0

    @initialize(
        ranks=st.integers(1, 4),
        capacity=st.integers(60, 400),
        short=st.sampled_from([0, 4, 16]),
        reserve=st.sampled_from(list(Reserve)),
        ratio=st.sampled_from([2.0, math.inf]),
    )
    def begin(self, ranks: int, capacity: int, short: int, reserve: Reserve, ratio: float) -> None:
        policy = Policy(
            window_tokens=8,
            keys_per_query=ratio,
            short_tokens=short,
            slice_seconds=0.002,
            prefix_block_tokens=8,
            max_sequences=8,
            reserve=reserve,
            default_output_tokens=20,
        )
        self.whole = ranks
        self.ring = Ring(policy=policy, ranks=ranks, capacity=capacity)

    @rule(
        family=st.integers(0, 2),
        share=SHARES,
        common=st.sampled_from([0.0, 0.3, 0.9]),
        max_tokens=st.integers(1, 30),
        outputs=st.sampled_from([1, 1, 1, 2, 3]),
    )
    def submit(self, family: int, share: float, common: float, max_tokens: int, outputs: int) -> None:
        total = max(1, int(share * self.ring.scheduler.room.tokens) - max_tokens)
        self.number += 1
        tokens = [*prompt(int(common * total), family), *prompt(total - int(common * total), 100 + self.number)]
        self.ask(tokens, max_tokens, outputs)

    @rule(family=st.integers(0, 2), share=SHARES)
    def submit_again(self, family: int, share: float) -> None:
        self.number += 1
        self.ask(prompt(max(1, int(share * self.ring.scheduler.room.tokens) - 10), family), 5, 1)

    @precondition(lambda self: hasattr(self, "ring") and self.ring.ranks.ranks == self.whole > 1)
    @rule(count=st.integers(2, 4), max_tokens=st.integers(1, 30), steps=st.integers(0, 6))
    def fill_and_lose(self, count: int, max_tokens: int, steps: int) -> None:
        """All at once, so that nobody ends before a rank is lost: several have to wait for room then."""
        each = int(0.95 / count * self.ring.scheduler.room.tokens) - max_tokens
        for _ in range(count):
            self.number += 1
            self.ask(prompt(max(1, each), 100 + self.number), max_tokens, 1)
        self.run(steps)
        self.ring.reform({rank: rank for rank in range(self.whole - 1)}, self.whole - 1)

    def ask(self, tokens: list[int], max_tokens: int, outputs: int) -> None:
        name = f"r{self.number}"
        answer = self.ring.submit(name, tokens, max_tokens=max_tokens, outputs=outputs, stop_ids=STOP)
        if isinstance(answer, Accepted):
            assert answer.cached_tokens < len(tokens)
            self.wanted[name] = (tokens, max_tokens, outputs)

    @rule(count=st.integers(1, 12))
    def run(self, count: int) -> None:
        for _ in range(count):
            if self.ring.step() is None:
                self.nobody_could_go_on()

    def nobody_could_go_on(self) -> None:
        """Where nothing is to be done, every request that is not over is too large for the ring as it is."""
        room, ranks = self.ring.scheduler.room, self.ring.ranks.ranks
        over = self.cancelled | {
            (event.request, event.output) for event in self.ring.events if isinstance(event, Ended)
        }
        for name, (tokens, max_tokens, outputs) in self.wanted.items():
            if any((name, output) not in over for output in range(outputs)):
                assert not room.holds(len(tokens), max_tokens, outputs, ranks=ranks)

    @precondition(lambda self: self.wanted)
    @rule(data=st.data(), one=st.booleans())
    def cancel(self, data: st.DataObject, one: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.wanted)))
        outputs = self.wanted[name][2]
        output = data.draw(st.integers(0, outputs - 1)) if one else None
        self.ring.scheduler.cancel(name, output)
        self.cancelled |= {(name, each) for each in range(outputs) if output in (None, each)}

    @rule(data=st.data(), in_flight=st.booleans(), cancel=st.booleans())
    def lose(self, data: st.DataObject, in_flight: bool, cancel: bool) -> None:
        ranks = self.ring.ranks.ranks
        lost = data.draw(st.integers(0, ranks - 1))
        if in_flight:
            self.break_a_step()
            if cancel and self.wanted:
                self.cancel(data, one=False)
        if ranks > 1 and ranks == self.whole:
            left = [rank for rank in range(ranks) if rank != lost]
            self.ring.reform({old: new for new, old in enumerate(left)}, ranks - 1)
        else:  # nobody is lost for good: the same processes, or one that came back empty
            kept = [rank for rank in range(ranks) if rank != lost or not cancel]
            self.ring.reform({rank: rank for rank in kept}, ranks)

    @rule()
    def heal(self) -> None:
        ranks = self.ring.ranks.ranks
        self.ring.reform({rank: rank for rank in range(ranks)}, self.whole)

    def break_a_step(self) -> None:
        step = self.ring.scheduler.plan(epoch=self.ring.epoch, number=0, now=self.ring.now)
        if step is not None:
            self.ring.ranks.run(step)

    @invariant()
    def charges_cover_what_is_held(self) -> None:
        known = self.ring.scheduler.snapshot()
        layouts = [sequence.layout for sequence in self.ring.scheduler._sequences.values()]
        for rank, held in enumerate(known.held):
            assert held == sum(layout.tokens(rank) for layout in layouts)
            assert held <= known.active[rank] + known.kept_tokens[rank] <= known.capacity_tokens

    @invariant()
    def what_all_may_come_to_hold_is_reserved_or_told_to_wait(self) -> None:
        known = self.ring.scheduler.snapshot()
        in_progress = [each for each in self.ring.scheduler._sequences.values() if each.job is not None]
        for each in in_progress:
            assert each.missing_tokens == sum(run.count for run in each.missing())
        most = sum(each.target + each.to_generate for each in in_progress)
        assert sum(known.active) + known.waiting_kv_tokens >= most
        assert known.parked or known.waiting_kv_tokens == 0
        assert known.waiting + known.parked or known.waiting_prompt_tokens == 0

    @invariant()
    def tokens_are_right_as_far_as_they_go(self) -> None:
        for name, (tokens, max_tokens, outputs) in self.wanted.items():
            for output in range(outputs):
                got = self.ring.tokens(name, output)
                assert got == reference(tokens, output, max_tokens, STOP)[: len(got)]

    def teardown(self) -> None:
        if not hasattr(self, "ring"):
            return
        self.ring.reform({rank: rank for rank in range(self.ring.ranks.ranks)}, self.whole)
        for _ in range(MOST_STEPS):
            if self.ring.step() is None:
                break
        assert self.ring.scheduler.expire(now=self.ring.now + 10_000) == [], "on the whole ring none stays parked"
        ended = {(event.request, event.output) for event in self.ring.events if isinstance(event, Ended)}
        for name, (tokens, max_tokens, outputs) in self.wanted.items():
            for output in range(outputs):
                if (name, output) in self.cancelled:
                    continue
                assert (name, output) in ended
                assert self.ring.tokens(name, output) == reference(tokens, output, max_tokens, STOP)
        known = self.ring.scheduler.snapshot()
        assert set(known.active) == {0}
        assert known.waiting == known.prefilling == known.decoding == known.parked == 0
        for kept in list(self.ring.scheduler._sequences.values()):
            self.ring.scheduler._forget(kept)
        assert set(self.ring.scheduler.snapshot().held) == {0}


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@settings(max_examples=40, deadline=None)
@given(
    long=st.integers(1_500, 4_000),
    shorts=st.lists(st.tuples(st.floats(0, 0.5), st.integers(1, 40)), min_size=1, max_size=25),
    ttft=st.sampled_from([0.001, 0.1, 10.0]),
    longs=st.integers(1, 3),
    ratio=st.sampled_from([2.0, math.inf]),
)
def test_long_prefills_delay_a_short_one_by_one_window_at_most_and_all_end(
    long: int, shorts: Sequence[tuple[float, int]], ttft: float, longs: int, ratio: float
) -> None:
    policy = Policy(
        window_tokens=16,
        keys_per_query=ratio,
        short_tokens=16,
        slice_seconds=0.004,
        ttft_seconds=ttft,
        prefix_block_tokens=10_000,
    )
    ring = Ring(policy=policy, capacity=100_000)
    for number in range(longs):
        ring.submit(f"long{number}", prompt(long, number), max_tokens=1)
    waiting = sorted(shorts)
    delays: dict[str, int] = {}
    began: set[str] = set()
    while True:
        while waiting and waiting[0][0] <= ring.now:
            name = f"s{len(delays)}"
            ring.submit(name, prompt(waiting.pop(0)[1], 50 + len(delays)), max_tokens=1)
            delays[name] = 0
        step = ring.step()
        if step is None:
            if not waiting:
                break
            ring.now = waiting[0][0]
            continue
        for name in delays:
            if ring.tokens(name):
                began.add(name)
            # One that came while a window was computed is submitted at its end: that window is not counted here.
            elif step.window is not None and step.window.placement == "zigzag":
                delays[name] += 1
    assert began == set(delays)
    assert max(delays.values()) <= 1
    assert all(ring.tokens(f"long{number}") for number in range(longs))
