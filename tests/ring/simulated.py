"""A ring of ranks without a model: it keeps the tables that steps describe, and KV that shows any mistake.

The KV of a position is a hash of all tokens up to it, made from the KV of the position before, which must be there. So
tokens come out right only if each KV was computed from the right ones, and copied, cut and kept where it belongs.
"""

from collections.abc import Mapping, Sequence

from kvplane_runtime.ring.admission import Refusal
from kvplane_runtime.ring.layout import Layout
from kvplane_runtime.ring.messages import Step
from kvplane_runtime.ring.recovery import reconcile
from kvplane_runtime.ring.requests import Accepted, Event, Policy, Request, Token
from kvplane_runtime.ring.sampling import Sampled, Sampling
from kvplane_runtime.ring.scheduler import Scheduler

VOCABULARY = 50


def chain(before: int, token: int) -> int:
    return hash((before, token))


def next_token(kv: int, output: int) -> int:
    return hash((kv, output, 17)) % VOCABULARY


def reference(prompt: Sequence[int], output: int, max_tokens: int, stop_ids: frozenset[int]) -> list[int]:
    """What one output is to be."""
    kv = 0
    for token in prompt:
        kv = chain(kv, token)
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        tokens.append(next_token(kv, output))
        if tokens[-1] in stop_ids:
            break
        kv = chain(kv, tokens[-1])
    return tokens


class Ranks:
    """All ranks at once."""

    def __init__(self, ranks: int, capacity: int) -> None:
        self.ranks = ranks
        self.capacity = capacity
        self.layouts: dict[int, Layout] = {}
        self.kv: dict[int, dict[int, int]] = {}

    def run(self, step: Step) -> list[int]:
        """The KV whose logits rank 0 gets, by row."""
        for sequence in step.release:
            self.layouts.pop(sequence, None)
            self.kv.pop(sequence, None)
        for cut in step.truncate:
            self._truncate(cut.sequence, cut.length)
        for fork in step.fork:
            assert fork.child not in self.layouts
            layout = self.layouts[fork.parent].copy()
            layout.truncate(fork.length)
            assert layout.complete()
            assert layout.length == fork.length
            self.layouts[fork.child] = layout
            self.kv[fork.child] = {at: self.kv[fork.parent][at] for at in range(fork.length)}
        rows = []
        for decode in step.decode:
            layout, kv = self.layouts[decode.sequence], self.kv[decode.sequence]
            assert layout.complete()
            layout.append_token(decode.position)
            kv[decode.position] = chain(kv[decode.position - 1], decode.token)
            rows.append(kv[decode.position])
        if step.window is not None:
            rows += self._window(step)
        self.check()
        return rows

    def _window(self, step: Step) -> list[int]:
        window = step.window
        assert window is not None
        layout = self.layouts.setdefault(window.sequence, Layout(self.ranks))
        kv = self.kv.setdefault(window.sequence, {})
        end = window.start + len(window.tokens)
        missing = [at for run in layout.missing(window.start, end) for at in range(run.first, run.last + 1, run.step)]
        assert missing[0] == window.start
        assert missing[-1] == end - 1
        if window.placement != "zigzag":
            assert all(rank == window.placement or not layout.tokens(rank) for rank in range(self.ranks))
        for at in missing:
            assert at not in kv
            kv[at] = chain(kv[at - 1] if at else 0, window.tokens[at - window.start])
        layout.append(layout.pieces(window.start, len(window.tokens), window.placement))
        return [kv[end - 1]] if window.logits else []

    def check(self) -> None:
        for rank in range(self.ranks):
            assert sum(layout.tokens(rank) for layout in self.layouts.values()) <= self.capacity, "out of memory"

    def held(self) -> tuple[int, ...]:
        return tuple(sum(layout.tokens(rank) for layout in self.layouts.values()) for rank in range(self.ranks))

    def reform(self, lengths: Mapping[int, int], mapping: Mapping[int, int], ranks: int) -> dict[int, Layout]:
        """Ranks without a new number are lost; what is not in ``lengths``, or behind them, is dropped."""
        for sequence in list(self.layouts):
            if sequence not in lengths:
                del self.layouts[sequence], self.kv[sequence]
        for sequence in self.layouts:
            self._truncate(sequence, lengths[sequence])
        before = {new: old for old, new in mapping.items()}
        reports = [
            {sequence: layout.runs(before[rank]) for sequence, layout in self.layouts.items()} if rank in before else {}
            for rank in range(ranks)
        ]
        placed = {sequence: layout.length for sequence, layout in self.layouts.items()}
        self.layouts = reconcile(placed, reports, seniority=range(ranks))
        for sequence, layout in self.layouts.items():
            there = {at for rank in range(ranks) for part in layout.held(rank) for at in range(part.begin, part.end)}
            self.kv[sequence] = {at: kv for at, kv in self.kv[sequence].items() if at in there}
        self.ranks = ranks
        return {sequence: layout.copy() for sequence, layout in self.layouts.items()}

    def _truncate(self, sequence: int, length: int) -> None:
        self.layouts[sequence].truncate(length)
        self.kv[sequence] = {at: kv for at, kv in self.kv[sequence].items() if at < length}


def sampled(scheduler: Scheduler, step: Step, rows: Sequence[int]) -> dict[int, Sampled]:
    """The tokens of the draws of ``step``."""
    return {draw.sequence: Sampled(next_token(rows[draw.row], draw.output)) for draw in scheduler.draws(step)}


def seconds(step: Step, ranks: int) -> float:
    """What a step takes: 20 us a token of the busiest rank and a little for each pair, 5 ms for the decode batch."""
    total = 0.005 if step.decode else 0.0
    if step.window is not None:
        window = step.window
        tokens = len(window.tokens) / (ranks if window.placement == "zigzag" else 1)
        total += 0.001 + 20e-6 * tokens + 1e-9 * tokens * (window.start + len(window.tokens) / 2)
    return total


POLICY = Policy(window_tokens=16, short_tokens=8, prefix_block_tokens=8, default_output_tokens=32)


class Ring:
    """A scheduler and its ranks, in simulated time."""

    def __init__(self, *, policy: Policy = POLICY, ranks: int = 4, capacity: int = 10_000) -> None:
        self.scheduler = Scheduler(policy=policy, ranks=ranks, whole=ranks, capacity=capacity, uniform=lambda: 0.5)
        self.ranks = Ranks(ranks, capacity)
        self.now = 0.0
        self.epoch = 0
        self.events: list[Event] = []
        self.steps: list[Step] = []

    def submit(
        self,
        name: str,
        prompt: list[int],
        *,
        max_tokens: int | None = 4,
        outputs: int = 1,
        stop_ids: frozenset[int] = frozenset(),
    ) -> Accepted | Refusal:
        request = Request(name, prompt, max_tokens, Sampling(), outputs, stop_ids)
        return self.scheduler.submit(request, now=self.now)

    def step(self) -> Step | None:
        step = self.scheduler.plan(epoch=self.epoch, number=len(self.steps), now=self.now)
        if step is None:
            return None
        took = seconds(step, self.ranks.ranks)
        rows = self.ranks.run(step)
        self.now += took
        self.events += self.scheduler.complete(step, sampled(self.scheduler, step, rows), seconds=took)
        self.steps.append(step)
        return step

    def drain(self) -> None:
        while self.step() is not None:
            pass

    def reform(self, mapping: dict[int, int], ranks: int) -> None:
        lengths = {table.sequence: len(table.tokens) for table in self.scheduler.tables()}
        layouts = self.ranks.reform(lengths, mapping, ranks)
        self.scheduler.reform(layouts, ranks=ranks, capacity=self.ranks.capacity, now=self.now)
        self.epoch += 1

    def tokens(self, name: str, output: int = 0) -> list[int]:
        return [
            event.sampled.token
            for event in self.events
            if isinstance(event, Token) and (event.request, event.output) == (name, output)
        ]


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(seed * 7919 + at * 31) % 50 for at in range(length)]
