"""What is kept of the requests that were let in, and the sums over them that the gates ask for.

Every sum is of whole numbers and is kept as requests come, grow and go, so that a decision costs the same beside 5 as
beside 500 requests, and everything is exactly 0 when nothing is in flight.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from kvplane_runtime.admission.demand import Demand, Entry
from kvplane_runtime.admission.lengths import Curve
from kvplane_runtime.admission.peak import NOTHING, ONE, Peak, Profile, blocks_held, expected, worst

_REDRAW_TOKENS: Final = 16
"""Tokens of each output after which a profile is drawn anew."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How the engine keeps KV, as far as the arithmetic needs it."""

    block_size: int = 1
    """1 while unknown: blocks are tokens then."""
    shared: bool = True
    """Outputs of one request share its whole prompt blocks."""
    worst: bool = False
    """Reserve all that a request may generate, not what is expected."""
    lookahead: int = 0
    """Speculative slots of each sequence."""


@dataclass(slots=True, eq=False)
class Running:
    """One request that was let in."""

    entry: Entry
    sent_at: float
    curve: Curve
    limit: int | None
    """Most tokens of one output."""
    expected_output: float
    """Tokens over all its outputs, as expected when it was let in."""
    prefill_outstanding: int
    """Prompt tokens on their way when it was sent, its own included."""
    profile: Profile = NOTHING
    """``NOTHING`` until it is drawn; that of a request that has not begun may be given."""
    redraw_at: int = 0
    held: int = 0
    """Blocks that its prompt and outputs take."""
    held_until: int = 0
    """Tokens of each output up to which ``held`` is right."""
    last_at: float = 0.0
    """When its newest token came."""
    window_at: float = 0.0
    window_generated: int = 0
    returned: bool = False
    """The engine sent it back once."""


def profile(demand: Demand, *, curve: Curve, generated: int, limit: int | None, shape: Shape) -> Profile:
    """What a request with ``generated`` tokens in each output is expected to hold, or may hold at most."""
    if shape.worst and limit is not None:
        return worst(
            prompt=demand.prompt_tokens,
            limit=limit,
            outputs=demand.outputs,
            lookahead=shape.lookahead,
            block_size=shape.block_size,
        )
    return expected(
        curve=curve,
        prompt=demand.prompt_tokens,
        generated=generated,
        limit=limit,
        outputs=demand.outputs,
        block_size=shape.block_size,
        shared=shape.shared,
    )


def held(demand: Demand, *, generated: int, shape: Shape) -> int:
    """Blocks that a request holds with ``generated`` tokens in each output."""
    return blocks_held(
        prompt=demand.prompt_tokens,
        generated=generated,
        outputs=demand.outputs,
        block_size=shape.block_size,
        shared=shape.shared,
    )


class InFlight:
    """The requests that were let in and are not over."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.peak = Peak()
        self.held = 0
        """Blocks of all prompts and outputs so far."""
        self.held_present = 0
        """Of those, the blocks of requests that have their first token: surely in the engine."""
        self.prompt_blocks_present = 0
        self.sequences = 0
        self.decoding = 0
        """Sequences of requests that have their first token."""
        self._running: dict[Entry, Running] = {}

    def __len__(self) -> int:
        return len(self._running)

    def __iter__(self) -> Iterator[Running]:
        return iter(self._running.values())

    def get(self, entry: Entry) -> Running | None:
        """What is kept of a request; None if it is not in flight."""
        return self._running.get(entry)

    @property
    def youngest(self) -> Running | None:
        """The one let in last."""
        return next(reversed(self._running.values()), None)

    def add(self, running: Running) -> None:
        """A request is let in."""
        self._running[running.entry] = running
        self.sequences += running.entry.demand.outputs
        self._measure(running)

    def first_token(self, running: Running) -> None:
        """Its prompt is computed, so its blocks are in the engine."""
        self.decoding += running.entry.demand.outputs
        self.held_present += running.held
        self.prompt_blocks_present += self._prompt_blocks(running)

    def progress(self, running: Running, generated: int) -> None:
        """It has ``generated`` tokens over all outputs."""
        running.entry.generated = generated
        each = -(-generated // running.entry.demand.outputs)
        if each > running.held_until:
            self._hold(running, each)
        if each >= running.redraw_at:
            self.peak.remove(running.profile)
            self._draw(running, each)

    def remove(self, entry: Entry) -> Running | None:
        """It is over; None if it is not in flight."""
        running = self._running.pop(entry, None)
        if running is None:
            return None
        self.sequences -= entry.demand.outputs
        self._unmeasure(running)
        return running

    def steps_until_free(self, blocks: float) -> float | None:
        """Decode steps until so many reserved blocks have been given back, each request's when it is expected to end.

        For reservations that stay whole until then; the others' profiles say it themselves (``Peak.steps_until``). None
        if not even all of them are enough.
        """
        ends = []
        for running in self:
            each = -(-running.entry.generated // running.entry.demand.outputs)
            ends.append((running.curve.remaining(each, running.limit), running.profile.mean[0] / ONE))
        for steps, freed in sorted(ends):
            blocks -= freed
            if blocks <= 0:
                return steps
        return None

    def reshape(self, shape: Shape) -> None:
        """The engine turns out to keep KV otherwise, or another reservation is wanted."""
        if shape == self.shape:
            return
        for running in self:
            self._unmeasure(running)
        self.shape = shape
        for running in self:
            self._measure(running)

    def _measure(self, running: Running) -> None:
        each = -(-running.entry.generated // running.entry.demand.outputs)
        running.held = 0
        present = running.entry.first_token_at is not None
        running.held = held(running.entry.demand, generated=each, shape=self.shape)
        self._note_limit(running, each)
        self.held += running.held
        if present:
            self.first_token(running)
        if running.profile is NOTHING:
            self._draw(running, each)
        else:
            self._expect(running, each)

    def _unmeasure(self, running: Running) -> None:
        self.held -= running.held
        self.peak.remove(running.profile)
        running.profile = NOTHING
        if running.entry.first_token_at is not None:
            self.decoding -= running.entry.demand.outputs
            self.held_present -= running.held
            self.prompt_blocks_present -= self._prompt_blocks(running)

    def _hold(self, running: Running, each: int) -> None:
        more = held(running.entry.demand, generated=each, shape=self.shape) - running.held
        running.held += more
        self.held += more
        if running.entry.first_token_at is not None:
            self.held_present += more
        self._note_limit(running, each)

    def _note_limit(self, running: Running, each: int) -> None:
        # The next block is needed when prompt + output pass a multiple of the block size, whatever part is shared.
        size = self.shape.block_size
        tokens = running.entry.demand.prompt_tokens + each
        running.held_until = each + (-tokens % size)

    def _draw(self, running: Running, each: int) -> None:
        running.profile = profile(
            running.entry.demand, curve=running.curve, generated=each, limit=running.limit, shape=self.shape
        )
        self._expect(running, each)

    def _expect(self, running: Running, each: int) -> None:
        running.redraw_at = each + _REDRAW_TOKENS
        self.peak.add(running.profile)

    def _prompt_blocks(self, running: Running) -> int:
        return held(running.entry.demand, generated=0, shape=self.shape)
