"""Rank 0's model thread: takes requests in, has the scheduler plan steps, sends and runs them, and heals the ring.

One loop, one thread, one owner of scheduler, tables and model. Everything reaches it through its inbox: requests from the
API (:class:`RingEngine`), orders from the hub (:class:`control.Hub`). Between two steps it takes in all that has come; nothing
else is concurrent here. When the ring breaks the loop stops, writes the tables of the next one from what each member
surely holds (:mod:`recovery`), and goes on; the scheduler computes what is missing before it decodes on, so a stream whose
rank was lost continues with the token that would have come.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

import numpy as np

from kvplane_runtime.ring import messages, recovery, worker
from kvplane_runtime.ring.admission import Refusal
from kvplane_runtime.ring.api import RejectedError
from kvplane_runtime.ring.communicator import PATIENT_SECONDS, RingBrokenError
from kvplane_runtime.ring.control import FormOrder, Gone, Hub, Order, Seat
from kvplane_runtime.ring.layout import Layout
from kvplane_runtime.ring.membership import BUILT, SELF, Fence, Formed, Lost
from kvplane_runtime.ring.model import StepResult
from kvplane_runtime.ring.requests import Accepted, Ended, Event, Failed, Policy, Request, Token
from kvplane_runtime.ring.sampling import NotFiniteError, Sampled, sample
from kvplane_runtime.ring.scheduler import Scheduler
from kvplane_runtime.ring.state import RankTraffic, State

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
class Promise:
    """Another promised time to the first token, by which prefills are ordered from now on."""

    ttft_seconds: float


@dataclass(frozen=True, slots=True)
class Shutdown:
    """The loop ends after the step under way; whoever waits is told ``refusal``."""

    refusal: Refusal


Incoming = Submit | Cancel | Promise | Shutdown
"""What comes to the loop from this side of the ring."""


@dataclass(frozen=True, slots=True)
class About:
    """What does not change about the ring."""

    pod: str
    """Name of this pod."""
    served_name: str
    world_size: int
    capacity_tokens: int
    """KV tokens of this rank: what is said of the ring before there is one."""
    store: str
    """``host:port`` of the rendezvous store, as other ranks reach it."""


@dataclass(frozen=True, slots=True)
class _Flight:
    step: messages.Step
    result: StepResult
    began: float
    seconds: float


@dataclass(slots=True)
class _Client:
    tell: Callable[[Event | Refusal], None]
    outputs: set[int]
    """That are not over."""


class Leader:
    """Rank 0's loop. ``inbox`` takes requests and the hub's orders alike."""

    def __init__(
        self,
        *,
        about: About,
        place: worker.Place,
        hub: Hub,
        inbox: "SimpleQueue[Order | Incoming]",
        policy: Policy,
        uniform: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``uniform`` draws from [0, 1), for the scheduler."""
        self._about = about
        self._place = place
        self._hub = hub
        self._inbox = inbox
        self._policy = policy
        self._uniform = uniform
        self._clock = clock
        self._scheduler = self._new_scheduler(about.world_size, about.capacity_tokens)
        self._lag = recovery.Lag()
        self._clients: dict[str, _Client] = {}
        self._flight: _Flight | None = None
        """Computed here, and not yet where it was to be computed."""
        self._over: Refusal | None = None
        self._epoch = -1
        self._formed = False
        self._members: tuple[int, ...] = ()
        self._number = 0
        self._finished: dict[int, int] = {}
        """Last finished step by rank, of this epoch."""
        self._began = self._expired_at = self._whole_at = self._progress_at = clock()
        self._startup_seconds: float | None = None
        self._cause = "joined"
        """Of the next ring: lost, if a member was lost since the ring worked; else left, if one was told to end; else joined."""
        self._reforms = {"lost": 0, "left": 0, "joined": 0}
        self._recovery_seconds: tuple[float, ...] = ()
        self._loading: dict[int, float] = {}
        self._traffic: dict[int, RankTraffic] = {}
        """By ordinal."""
        self.state = self._state()
        """The ring as it was after the last step or change; another thread may read it."""

    def run(self) -> None:
        """Until :class:`Shutdown`. Raises what the model raises by its own fault: the process is to end then."""
        while self._over is None:
            idle = not self._turn()
            self._take_in(wait=_EXPIRE_SECONDS if idle else 0.0)
        self._place.leave()
        self._publish(self._scheduler.fail_all(self._over))

    def hung(self) -> str | None:
        """As :meth:`worker.Place.hung`. From any thread."""
        return self._place.hung()

    def _new_scheduler(self, ranks: int, capacity: int) -> Scheduler:
        whole = self._about.world_size
        return Scheduler(policy=self._policy, ranks=ranks, whole=whole, capacity=capacity, uniform=self._uniform)

    def _state(self) -> State:
        return State(
            pod=self._about.pod,
            served_name=self._about.served_name,
            formed=self._formed,
            epoch=self._epoch,
            world_size=self._about.world_size,
            members=self._members,
            loading=dict(self._loading),
            reforms=dict(self._reforms),
            recovery_seconds=self._recovery_seconds,
            startup_seconds=self._startup_seconds,
            traffic=tuple(self._traffic.get(ordinal, RankTraffic()) for ordinal in self._members),
            scheduler=self._scheduler.snapshot(),
        )

    # What comes in.

    def _take_in(self, *, wait: float) -> None:
        """All that has come; waits for something to come if there is nothing to do."""
        for order in self._come(wait=wait):
            self._obey(order)
        self._expire()
        self.state = self._state()

    def _come(self, *, wait: float = 0.0) -> Iterator[Order | Incoming]:
        """What has come, and what comes meanwhile; waits only for the first."""
        with contextlib.suppress(Empty):
            order = self._inbox.get(timeout=wait) if wait else self._inbox.get_nowait()
            while True:
                yield order
                order = self._inbox.get_nowait()

    def _obey(self, order: Order | Incoming) -> None:
        match order:
            case Submit():
                self._submit(order)
            case Cancel():
                self._cancel(order)
            case Promise():
                self._policy = replace(self._policy, ttft_seconds=order.ttft_seconds)
                self._scheduler.policy = self._policy
            case Shutdown():
                self._over = order.refusal
            case Fence():
                self._fence(order)
            case FormOrder():
                self._form(order)
            case Formed():
                self._resume(order)
            case messages.Done():
                self._done(order)
            case messages.Loading():
                self._loading[order.ordinal] = order.loaded_bytes / max(1, order.total_bytes)
            case Gone() | Lost():
                self._loading.pop(order.ordinal, None)

    def _submit(self, submit: Submit) -> None:
        request = submit.request
        if self._epoch < 0:
            refusal = "The ring is not formed yet; retry when it is."
            submit.tell(Refusal(503, "ring_not_formed", refusal, retry_after_seconds=5))
            return
        if request.id in self._clients:
            refusal = f"The request {request.id!r} is in progress already; give each its own id."
            submit.tell(Refusal(409, "request_in_progress", refusal))
            return
        answer = self._scheduler.submit(request, now=self._clock())
        if isinstance(answer, Accepted):
            self._clients[request.id] = _Client(submit.tell, set(range(request.outputs)))
        submit.tell(answer)

    def _cancel(self, cancel: Cancel) -> None:
        client = self._clients.get(cancel.request)
        if client is None:
            return
        self._scheduler.cancel(cancel.request, cancel.output)
        client.outputs -= {cancel.output} if cancel.output is not None else client.outputs.copy()
        if not client.outputs:
            del self._clients[cancel.request]

    def _expire(self) -> None:
        now = self._clock()
        if now - self._expired_at < _EXPIRE_SECONDS:
            return
        self._expired_at = now
        self._publish(self._scheduler.expire(now=now))
        if not self._formed and self._clients and now - self._whole_at > self._policy.park_seconds:
            waited = (
                f"The ring has had too few ranks for {self._policy.park_seconds:g} s; retry when it is formed again."
            )
            self._publish(self._scheduler.fail_all(Refusal(503, "ring_not_formed", waited, retry_after_seconds=30)))

    def _publish(self, events: Sequence[Event]) -> None:
        for event in events:
            client = self._clients.get(event.request)
            if client is None:
                continue
            client.tell(event)
            if isinstance(event, Ended):
                client.outputs.discard(event.output)
            if isinstance(event, Failed) or not client.outputs:
                del self._clients[event.request]

    # Steps.

    def _turn(self) -> bool:
        """Does what there is to do: finishes a step, or runs one. False where there is nothing."""
        if not self._formed:
            # A ring that was not left ends when its last step is done everywhere, and no exchange may wait for who never ends it.
            last = self._behind(self._number - 1) if self._place.epoch >= 0 else None
            return False if last is None else self._wait_for(last)
        if self._flight is not None:
            return self._land(self._flight)
        behind = self._behind(self._number - 2)
        if behind is not None:  # it has no part in these steps
            return self._wait_for(behind)
        step = self._scheduler.plan(epoch=self._epoch, number=self._number, now=self._clock())
        if step is None:
            return False
        self._number += 1
        self._lag.begin(step, self._place.layouts())
        began = self._progress_at = self._clock()
        self._hub.step(step)
        try:
            result = self._place.run(step)
        except RingBrokenError as error:
            log.warning("Step %d of epoch %d broke: %s", step.number, step.epoch, error)
            self._halt()
            self._hub.answer(worker.fault(step, SELF, error))
            return False
        self._hub.answer(worker.done(step, SELF, result))
        self._flight = _Flight(step, result, began, seconds=self._clock() - began)
        come = list(self._come())
        for order in come:
            if isinstance(order, Submit):  # it has waited for this step, which the scheduler is to know when it ends
                self._submit(order)
        landed = self._land(self._flight)
        for order in come:
            if not isinstance(order, Submit):
                self._obey(order)
        return landed or bool(come)

    def _land(self, flight: _Flight) -> bool:
        """Takes the result of a step, once it was computed everywhere where it had to be."""
        step, seconds = flight.step, flight.seconds
        where = step.window.placement if step.window is not None and step.window.placement != "zigzag" else SELF
        if where != SELF:  # only that rank has computed it
            if self._finished.get(where, BUILT) < step.number:
                return self._wait_for(where)
            seconds = self._clock() - flight.began
        self._flight = None
        sampled, failed = self._sample(flight)
        self._publish(self._scheduler.complete(step, sampled, seconds=seconds, failed=failed))
        return True

    def _sample(self, flight: _Flight) -> tuple[dict[int, Sampled], dict[int, Refusal]]:
        """By sequence, the token that follows, or why there is none: where the model computed nonsense any would be wrong."""
        sampled: dict[int, Sampled] = {}
        failed: dict[int, Refusal] = {}
        draws = self._scheduler.draws(flight.step)
        if not draws:
            return sampled, failed
        logits = _rows(flight.result)
        for draw in draws:
            try:
                sampled[draw.sequence] = sample(logits, draw)
            except NotFiniteError as error:
                log.error("%s", error)  # noqa: TRY400  (the sentence says all)
                failed[draw.sequence] = Refusal(500, "not_finite", str(error))
        return sampled, failed

    def _behind(self, number: int) -> int | None:
        """A rank that has not finished the step of that number; None where all have."""
        return next((rank for rank, finished in self._finished.items() if finished < number), None)

    def _wait_for(self, rank: int) -> bool:
        """False: nothing can be done before that rank has answered, which wakes this loop. One that lives and never does breaks
        the ring.
        """
        if self._clock() - self._progress_at > PATIENT_SECONDS:
            self._halt()
            reason = f"rank {rank} has not answered for {PATIENT_SECONDS:g} s"
            self._hub.answer(messages.Fault(self._epoch, SELF, self._number - 1, reason, rank))
        return False

    def _done(self, done: messages.Done) -> None:
        if done.epoch != self._epoch:
            return
        self._progress_at = self._clock()
        self._finished[done.rank] = done.number
        ordinal = self._members[done.rank]
        self._traffic[ordinal] = self._traffic.get(ordinal, RankTraffic()).plus(done.traffic)

    # A new ring.

    def _halt(self) -> None:
        """No more steps until the next ring is formed."""
        if self._formed:
            self._whole_at = self._progress_at = self._clock()
        self._formed = False

    def _fence(self, fence: Fence) -> None:
        """Stops: this is between two steps, or the step has broken."""
        self._halt()
        if fence.lost:
            self._cause = "lost"
        if fence.abort:
            self._place.leave()
        self._hub.stopped(fence.epoch)

    def _form(self, order: FormOrder) -> None:
        """Writes the forms of a new ring, gives the scheduler what is left, and enters the ring."""
        first = self._epoch < 0
        ranks = len(order.seats)
        capacity = min(seat.capacity_tokens for seat in order.seats)
        tables = self._scheduler.tables()
        tokens = {table.sequence: table.tokens for table in tables}
        if first:
            tokens = recovery.gather(table for seat in order.seats for table in seat.tables)
        layouts = {table.sequence: worker.layout(table) for table in tables}
        kept = recovery.reconcile(
            {sequence: len(known) for sequence, known in tokens.items()},
            [self._report(seat, layouts, tokens) for seat in order.seats],
            seniority=sorted(range(ranks), key=lambda rank: (order.seats[rank].rank_before is None, rank)),
        )
        written = [
            messages.Table.of(
                sequence, tokens[sequence], [worker.positions(layout.runs(rank)) for rank in range(ranks)]
            )
            for sequence, layout in kept.items()
        ]
        members = [seat.member for seat in order.seats]
        if self._cause == "joined" and not set(self._members) <= {member.ordinal for member in members}:
            self._cause = "left"  # nothing broke, and yet somebody is away
        forms = {
            seat.link: messages.Form(order.epoch, rank, members, self._about.store, written)
            for rank, seat in enumerate(order.seats)
        }
        if not self._hub.form(order.epoch, forms):
            return
        if first:
            self._scheduler = self._new_scheduler(ranks, capacity)
            self._scheduler.restore(written, ranks=ranks)
        else:
            self._scheduler.reform(kept, ranks=ranks, capacity=capacity, now=self._clock())
        self._flight = None
        self._lag.clear()
        self._number = 0
        self._finished = dict.fromkeys(range(ranks), BUILT)
        self._epoch = order.epoch
        self._members = tuple(member.ordinal for member in members)
        try:
            self._place.form(forms[SELF])
        except RingBrokenError as error:
            self._hub.answer(messages.Fault(order.epoch, SELF, BUILT, str(error), worker.suspect(error)))
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

    def _resume(self, formed: Formed) -> None:
        if formed.epoch != self._epoch:
            return
        self._formed = True
        self._loading = {ordinal: share for ordinal, share in self._loading.items() if ordinal not in self._members}
        cause, self._cause = self._cause, "joined"
        if self._startup_seconds is None:
            self._startup_seconds = self._clock() - self._began
            return
        self._reforms[cause] += 1
        if cause == "lost":
            self._recovery_seconds = (*self._recovery_seconds, formed.seconds)


class RingEngine:
    """The engine as the API sees it: requests and events of one event loop, while the leader works on its own thread."""

    def __init__(self, *, leader: Leader, inbox: "SimpleQueue[Order | Incoming]") -> None:
        self._leader = leader
        self._inbox = inbox
        self._events: dict[str, asyncio.Queue[Event | Refusal | Cancel]] = {}

    async def submit(self, request: Request) -> AsyncIterator[Event]:
        """See :class:`api.Engine`."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | Refusal | Cancel] = asyncio.Queue()
        outputs = set(range(request.outputs))

        def tell(event: Event | Refusal) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        self._events[request.id] = events
        self._inbox.put(Submit(request, tell))
        try:
            while outputs:
                event = await events.get()
                match event:
                    case Refusal():
                        outputs.clear()
                        raise RejectedError(event)
                    case Cancel():
                        outputs -= outputs.copy() if event.output is None else {event.output}
                    case Token() | Ended() if event.output not in outputs:
                        pass  # it was on its way when the output was aborted
                    case _:
                        if isinstance(event, Failed):
                            outputs.clear()
                        elif isinstance(event, Ended):
                            outputs.discard(event.output)
                        yield event
        finally:
            del self._events[request.id]
            if outputs:
                self._inbox.put(Cancel(request.id))

    def abort(self, request: str, output: int | None = None) -> None:
        """See :class:`api.Engine`."""
        if events := self._events.get(request):
            cancel = Cancel(request, output)
            events.put_nowait(cancel)
            self._inbox.put(cancel)

    def state(self) -> State:
        """See :class:`api.Engine`."""
        return self._leader.state

    def hung(self) -> str | None:
        """See :class:`api.Engine`."""
        return self._leader.hung()


def _rows(result: StepResult) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    if result.logits is None:
        raise ValueError("A step whose tokens are to be drawn gave rank 0 no logits.")
    return result.logits.cpu().numpy()
