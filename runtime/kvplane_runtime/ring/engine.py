"""Rank 0's model thread: takes requests in, has the scheduler plan steps, sends and runs them, and heals the ring.

One loop, one thread, one owner of scheduler, tables and model. Everything reaches it through its inbox: requests from the
front (:mod:`front`), orders from the hub (:class:`control.Hub`). Between two steps it takes in all that has come; nothing
else is concurrent here. When the ring breaks the loop stops, writes the tables of the next one from what each member
surely holds (:mod:`recovery`), and goes on; the scheduler computes what is missing before it decodes on, so a stream whose
rank was lost continues with the token that would have come.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import numpy as np

from kvplane_runtime.ring import messages, recovery, worker
from kvplane_runtime.ring.admission import Refusal
from kvplane_runtime.ring.communicator import RingBrokenError
from kvplane_runtime.ring.control import FormOrder, Hub, Order, Seat
from kvplane_runtime.ring.layout import Layout
from kvplane_runtime.ring.membership import BUILT, SELF, Fence, Formed, Lost
from kvplane_runtime.ring.model import StepResult
from kvplane_runtime.ring.sampling import NotFiniteError, sample
from kvplane_runtime.ring.scheduler import Accepted, Event, Failed, Policy, Request, Scheduler, Snapshot

log = logging.getLogger(__name__)

_EXPIRE_SECONDS = 1.0
"""Time between two looks for requests that were parked too long."""


@dataclass(frozen=True, slots=True)
class Submit:
    """A request, and who is told what became of it: first ``Accepted`` or a ``Refusal``, then events. Must return at once."""

    request: Request
    tell: Callable[[Event | Refusal], None]


@dataclass(frozen=True, slots=True)
class Cancel:
    """A request, or one output of it, that nobody wants any more."""

    request: str
    output: int | None = None


@dataclass(frozen=True, slots=True)
class Shutdown:
    """The loop ends after the step under way; whoever waits is told ``refusal``."""

    refusal: Refusal


@dataclass(slots=True)
class RankState:
    """What is known of one rank, by its last answer."""

    ordinal: int
    held_tokens: int = 0
    capacity_tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    compute_seconds: float = 0.0
    waited_seconds: float = 0.0
    sent_bytes: int = 0


@dataclass(slots=True)
class RingState:
    """What rank 0 knows of the ring. Written by the model's thread, read by any: each field is replaced, never changed."""

    epoch: int = -1
    formed: bool = False
    members: tuple[int, ...] = ()
    """Ordinals by rank."""
    formations: int = 0
    recovery_seconds: float | None = None
    """From the last fence until the ring was formed again; None before the first."""
    losses: int = 0
    loading: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """Bytes of weights loaded and in all, by ordinal of the ranks that are not members yet."""
    ranks: Mapping[int, RankState] = field(default_factory=dict)
    """By ordinal."""
    snapshot: Snapshot | None = None
    """None before the first ring."""


@dataclass(slots=True)
class _Flight:
    step: messages.Step
    result: StepResult
    seconds: float


class Leader:
    """Rank 0's loop. ``inbox`` takes requests and the hub's orders alike."""

    def __init__(
        self,
        *,
        place: worker.Place,
        hub: Hub,
        inbox: "SimpleQueue[Order | Submit | Cancel | Shutdown]",
        policy: Policy,
        store: str,
        uniform: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``store``: ``host:port`` of the rendezvous store, as other ranks reach it."""
        self._place = place
        self._hub = hub
        self._inbox = inbox
        self._policy = policy
        self._store = store
        self._uniform = uniform
        self._clock = clock
        self._scheduler: Scheduler | None = None
        self._lag = recovery.Lag()
        self._told: dict[str, Callable[[Event | Refusal], None]] = {}
        self._number = 0
        self._answered: dict[int, int] = {}
        """Last finished step by rank, of this epoch."""
        self._flight: _Flight | None = None
        """Computed here, and not yet where it was to be computed."""
        self._expired_at = clock()
        self._over: Refusal | None = None
        self.state = RingState()

    def run(self) -> None:
        """Until :class:`Shutdown`. Raises what the model raises by its own fault: the process is to end then."""
        while self._over is None:
            idle = not self._turn()
            self._take_in(wait=_EXPIRE_SECONDS if idle else 0.0)
        self._place.leave()
        if self._scheduler is not None:
            self._publish(self._scheduler.fail_all(self._over))

    # What comes in.

    def _take_in(self, *, wait: float) -> None:
        """All that has come; waits for something to come if there is nothing to do."""
        with contextlib.suppress(Empty):
            order = self._inbox.get(timeout=wait) if wait else self._inbox.get_nowait()
            while True:
                self._obey(order)
                order = self._inbox.get_nowait()
        self._expire()

    def _obey(self, order: Order | Submit | Cancel | Shutdown) -> None:
        match order:
            case Submit():
                self._submit(order)
            case Cancel():
                self._told.pop(order.request, None) if order.output is None else None
                if self._scheduler is not None:
                    self._scheduler.cancel(order.request, order.output)
            case Shutdown():
                self._over = order.refusal
            case Fence():
                self.state.formed = False
                if order.abort:
                    self._place.leave()
                self._hub.stopped(order.epoch)
            case FormOrder():
                self._form(order)
            case Formed():
                self._formed(order)
            case messages.Done():
                self._done(order)
            case messages.Loading():
                self.state.loading = {**self.state.loading, order.ordinal: (order.loaded_bytes, order.total_bytes)}
            case Lost():
                self.state.losses += 1

    def _submit(self, submit: Submit) -> None:
        if self._scheduler is None:
            submit.tell(Refusal(503, "ring_not_formed", "The ring is not formed yet; retry when it is.", retry_after_seconds=5))
            return
        answer = self._scheduler.submit(submit.request, now=self._clock())
        if isinstance(answer, Accepted):
            self._told[submit.request.id] = submit.tell
        submit.tell(answer)

    def _expire(self) -> None:
        now = self._clock()
        if self._scheduler is not None and now - self._expired_at >= _EXPIRE_SECONDS:
            self._expired_at = now
            self._publish(self._scheduler.expire(now=now))

    def _publish(self, events: Sequence[Event]) -> None:
        for event in events:
            tell = self._told.get(event.request)
            if tell is not None:
                tell(event)
            if isinstance(event, Failed):
                self._told.pop(event.request, None)

    # Steps.

    def _turn(self) -> bool:
        """Does what there is to do: finishes a step, or runs one. False where there is nothing."""
        scheduler = self._scheduler
        if scheduler is None or not self.state.formed:
            return False
        if self._flight is not None:
            return self._land()
        if any(number < self._number - 2 for number in self._answered.values()):
            return False  # a rank that takes no part in these steps is behind; its answer wakes this loop
        step = scheduler.plan(epoch=self.state.epoch, number=self._number, now=self._clock())
        if step is None:
            return False
        self._number += 1
        self._lag.begin(step, self._place.layouts())
        began = self._clock()
        self._hub.step(step)
        try:
            result = self._place.run(step)
        except RingBrokenError as error:
            log.warning("Step %d of epoch %d broke: %s", step.number, step.epoch, error)
            self.state.formed = False
            self._hub.answer(worker.fault(step, SELF, error))
            return False
        self._hub.answer(worker.done(step, SELF, result))
        self._flight = _Flight(step, result, self._clock() - began)
        self._flown_at = began
        return self._land()

    def _land(self) -> bool:
        """Takes the result of the step under way, once it was computed everywhere where it had to be."""
        flight = self._flight
        if flight is None or self._scheduler is None:
            return False
        step = flight.step
        elsewhere = step.window.placement if step.window is not None and step.window.placement != "zigzag" else SELF
        seconds = flight.seconds
        if elsewhere != SELF:
            if self._answered.get(elsewhere, BUILT) < step.number:
                return False
            seconds = self._clock() - self._flown_at
        self._flight = None
        draws = self._scheduler.draws(step)
        try:
            tokens = sample(_rows(flight.result), draws) if draws else []
        except NotFiniteError as error:
            self._poisoned(step, error)
            return True
        sampled = {draw.sequence: token for draw, token in zip(draws, tokens, strict=True)}
        self._publish(self._scheduler.complete(step, sampled, seconds=seconds, now=self._clock()))
        self.state.snapshot = self._scheduler.snapshot()
        return True

    def _poisoned(self, step: messages.Step, error: NotFiniteError) -> None:
        """The model computed nonsense: nobody gets a wrong token, and what was computed is not used again."""
        log.error("%s", error)
        if self._scheduler is not None:
            self._publish(self._scheduler.fail_all(Refusal(500, "not_finite", str(error))))
        self.state.formed = False
        self._hub.answer(messages.Fault(step.epoch, SELF, step.number, str(error)))

    def _done(self, done: messages.Done) -> None:
        if done.epoch != self.state.epoch:
            return
        self._answered[done.rank] = max(done.number, self._answered.get(done.rank, BUILT))
        ordinal = self.state.members[done.rank]
        before = self.state.ranks.get(ordinal) or RankState(ordinal)
        self.state.ranks = {
            **self.state.ranks,
            ordinal: RankState(
                ordinal=ordinal,
                held_tokens=done.held_tokens,
                capacity_tokens=before.capacity_tokens,
                steps=before.steps + 1,
                seconds=before.seconds + done.traffic.seconds,
                compute_seconds=before.compute_seconds + done.traffic.compute_seconds,
                waited_seconds=before.waited_seconds + done.traffic.waited_seconds,
                sent_bytes=before.sent_bytes + done.traffic.sent_bytes,
            ),
        }

    # A new ring.

    def _form(self, order: FormOrder) -> None:
        """Writes the forms of a new ring, enters it, and gives the scheduler what is left."""
        ranks = len(order.seats)
        capacity = min(seat.capacity_tokens for seat in order.seats)
        if self._scheduler is None:
            scheduler = Scheduler(policy=self._policy, ranks=ranks, capacity=capacity, uniform=self._uniform)
            layouts: Mapping[int, Layout] = {}
            tokens = recovery.gather(table for seat in order.seats for table in seat.tables)
        else:
            scheduler = self._scheduler
            tables = scheduler.tables()
            tokens = {table.sequence: table.tokens for table in tables}
            layouts = {table.sequence: worker.layout(table) for table in tables}
        now_held = recovery.reconcile(
            {sequence: len(known) for sequence, known in tokens.items()},
            [self._report(seat, layouts, tokens) for seat in order.seats],
            seniority=sorted(range(ranks), key=lambda rank: (order.seats[rank].rank_before is None, rank)),
        )
        new = [
            messages.Table(
                sequence, list(tokens[sequence]), [worker.positions(layout.runs(rank)) for rank in range(ranks)]
            )
            for sequence, layout in now_held.items()
            if any(layout.tokens(rank) for rank in range(ranks))
        ]
        members = [seat.member for seat in order.seats]
        forms = {
            seat.link: messages.Form(order.epoch, rank, members, self._store, new) for rank, seat in enumerate(order.seats)
        }
        if not self._hub.form(order.epoch, forms):
            return
        if self._scheduler is None:
            scheduler.restore(new, ranks=ranks)
            self._scheduler = scheduler
        else:
            scheduler.reform(now_held, ranks=ranks, capacity=capacity, now=self._clock())
        self._flight = None
        self._lag.clear()
        self._number = 0
        self._answered = dict.fromkeys(range(ranks), BUILT)
        self.state.epoch = order.epoch
        self.state.members = tuple(seat.member.ordinal for seat in order.seats)
        self.state.ranks = {
            seat.member.ordinal: RankState(
                seat.member.ordinal,
                held_tokens=sum(layout.tokens(rank) for layout in now_held.values()),
                capacity_tokens=seat.capacity_tokens,
            )
            for rank, seat in enumerate(order.seats)
        }
        self.state.snapshot = scheduler.snapshot()
        try:
            self._place.form(forms[SELF])
        except RingBrokenError as error:
            self._hub.answer(messages.Fault(order.epoch, SELF, BUILT, str(error)))
        else:
            self._hub.answer(messages.Formed(order.epoch, SELF))

    def _report(
        self, seat: Seat, layouts: Mapping[int, Layout], tokens: Mapping[int, Sequence[int]]
    ) -> recovery.Report:
        if seat.link == SELF:
            return self._place.held()
        if seat.rank_before is None:
            return recovery.brought(seat.tables, tokens)
        return self._lag.report(seat.rank_before, seat.finished, layouts)

    def _formed(self, formed: Formed) -> None:
        if formed.epoch != self.state.epoch:
            return
        self.state.formed = True
        self.state.formations += 1
        if self.state.formations > 1:
            self.state.recovery_seconds = formed.seconds
        self.state.loading = {o: state for o, state in self.state.loading.items() if o not in formed.ordinals}


def _rows(result: StepResult) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    if result.logits is None:
        raise ValueError("A step whose tokens are to be drawn gave rank 0 no logits.")
    return result.logits.cpu().numpy()
