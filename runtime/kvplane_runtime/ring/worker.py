"""The model's thread of a rank: builds the ring it is told to, runs the steps it is sent, says what it did or what broke.

All ranks do the same through :class:`Place`, rank 0 too; a worker's orders come over its :class:`control.Tether`. Three
things are never done here: wait where a fence could not wake it, go on in a ring that was fenced, and forget KV. A rank
that lost its ring, or rank 0, keeps tokens, layouts and KV, and offers them with its next ``Join``.

What a worker is at the moment may be asked from any thread: its ``account`` is a value that is replaced, never changed. So
may any rank be asked whether its model's thread hangs (:meth:`Place.hung`).
"""

import contextlib
import logging
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Final, Protocol

from kvplane_runtime.ring import messages
from kvplane_runtime.ring.communicator import FORM_SECONDS, PATIENT_SECONDS, Ring, RingBrokenError
from kvplane_runtime.ring.control import Left, Severed, Tether
from kvplane_runtime.ring.layout import Layout
from kvplane_runtime.ring.membership import BUILT
from kvplane_runtime.ring.model import StepResult
from kvplane_runtime.ring.ranges import Run
from kvplane_runtime.ring.state import WorkerAccount

log = logging.getLogger(__name__)

BUILD_WAITS: Final = 2
"""Times the limit of forming that the building of a ring may wait for others: for the store, and for its members."""


class Model(Protocol):
    """What is needed of a :class:`model.RingModel`."""

    def bind(self, ring: Ring, layouts: Mapping[int, Layout] | None = None) -> None: ...

    def run(self, step: messages.Step) -> StepResult: ...

    def held(self) -> Mapping[int, Sequence[Run]]: ...

    def layouts(self) -> Mapping[int, Layout]: ...


class Tokens:
    """The tokens of each sequence as far as they have KV: what a rank 0 that knows nothing has to be told."""

    def __init__(self) -> None:
        self.by_sequence: dict[int, array[int]] = {}

    def apply(self, step: messages.Step) -> None:
        """After ``step`` was finished."""
        for sequence in step.release:
            self.by_sequence.pop(sequence, None)
        for cut in step.truncate:
            del self.by_sequence[cut.sequence][cut.length :]
        for fork in step.fork:
            self.by_sequence[fork.child] = self.by_sequence[fork.parent][: fork.length]
        for decode in step.decode:
            self._write(decode.sequence, decode.position, [decode.token])
        if window := step.window:
            self._write(window.sequence, window.start, window.tokens)

    def restore(self, tables: Sequence[messages.Table]) -> None:
        """As a ``Form`` says."""
        self.by_sequence = {table.sequence: array(messages.TYPECODE, table.packed) for table in tables}

    def _write(self, sequence: int, start: int, tokens: list[int]) -> None:
        known = self.by_sequence.setdefault(sequence, array(messages.TYPECODE))
        known[start : start + len(tokens)] = array(messages.TYPECODE, tokens)


def positions(held: Sequence[Run]) -> list[messages.Positions]:
    """Runs as they go over the wire."""
    return [messages.Positions(run.first, run.count, run.step) for run in held]


def runs(held: Sequence[messages.Positions]) -> tuple[Run, ...]:
    """Runs as they came over the wire."""
    return tuple(Run(part.first, part.count, part.step) for part in held)


def layout(table: messages.Table) -> Layout:
    """The layout that a table describes."""
    return Layout(len(table.held), held=map(runs, table.held), length=len(table.tokens))


@dataclass(frozen=True, slots=True)
class _Task:
    """What the model's thread does, and since when."""

    name: str
    since: float
    longest: float
    """Seconds after which it hangs, waits in ``ring`` not counted."""
    ring: Ring | None
    waited: float
    """In ``ring``, before it began."""


class Place:
    """This process's place in one ring after another. All but :meth:`fence` and :meth:`hung` is for the model's thread."""

    def __init__(
        self,
        *,
        model: Model,
        build: Callable[[messages.Form], Ring],
        form_seconds: float = FORM_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``build`` makes the ring of a form; it waits for others for at most ``BUILD_WAITS`` times ``form_seconds``, and raises
        RingBrokenError.
        """
        self._model = model
        self._build = build
        self._form_seconds = form_seconds
        self._clock = clock
        self._task: _Task | None = None
        """None between two tasks, however long: then the model's thread waits for orders, and is well."""
        self._guard = threading.Lock()
        self._void = -1
        """Rings of earlier epochs are over."""
        self._ring: Ring | None = None
        self._awaited: tuple[int, SimpleQueue[Ring | Exception]] | None = None
        """The epoch of the ring that is being built, and where its outcome is awaited."""
        self.epoch = -1
        """Of the ring it is in; -1: none."""
        self.heard_of = -1
        """The last epoch it was told to enter."""
        self._tokens = Tokens()

    def form(self, form: messages.Form) -> None:
        """Leaves its ring, enters that of ``form``, and drops the KV that the form does not give it.

        Raises RingBrokenError if that is not to be, and then still holds all.
        """
        self.leave()
        self.heard_of = form.epoch
        with self._at_work("The way of this rank into a ring", PATIENT_SECONDS + BUILD_WAITS * self._form_seconds):
            ring = self._built(form)
            self._model.bind(ring, {table.sequence: layout(table) for table in form.tables})
            self._tokens.restore(form.tables)
        with self._guard:
            self._ring = ring
            void = self._void
        if form.epoch < void:
            ring.abort("it was fenced while it was built")
        self.epoch = form.epoch

    def run(self, step: messages.Step) -> StepResult:
        """Runs a step of the ring it is in. Raises RingBrokenError; what was held before is held then."""
        with self._at_work("A step of this rank, without its waits for others,", PATIENT_SECONDS):
            result = self._model.run(step)
            self._tokens.apply(step)
        return result

    def hung(self) -> str | None:
        """What shows that the model's thread hangs, in a sentence; None while it does not. From any thread.

        Only what this rank does by itself counts: who waits for others, in a step or for orders, is woken by fences and limits.
        A long prompt, or its refill after a loss, is many steps.
        """
        task = self._task
        if task is None:
            return None
        waited = 0.0 if task.ring is None else task.ring.waited() - task.waited
        seconds = self._clock() - task.since - waited
        if seconds <= task.longest:
            return None
        return f"{task.name} has taken {seconds:.0f} s, longer than {task.longest:g} s: it hangs."

    @contextlib.contextmanager
    def _at_work(self, name: str, longest: float) -> Iterator[None]:
        ring = self._ring
        self._task = _Task(name, self._clock(), longest, ring, 0.0 if ring is None else ring.waited())
        try:
            yield
        finally:
            self._task = None

    def fence(self, epoch: int, reason: str) -> None:
        """From any thread: rings before ``epoch`` are over; whoever waits in one is woken."""
        with self._guard:
            self._void = max(self._void, epoch)
            ring, awaited = self._ring, self._awaited
        if ring is not None and ring.epoch < epoch:
            ring.abort(reason)
        if awaited is not None and awaited[0] < epoch:
            awaited[1].put(RingBrokenError(f"The ring of epoch {awaited[0]} was fenced while it was built: {reason}."))

    def leave(self) -> None:
        """Is in no ring; KV, layouts and tokens stay."""
        with self._guard:
            ring, self._ring = self._ring, None
        if ring is not None:
            ring.abort("it was left")
        self.epoch = -1

    def unfence(self) -> None:
        """Forgets all fences: those of a rank 0 that is gone do not bind the next one."""
        with self._guard:
            self._void = -1

    def held(self) -> Mapping[int, Sequence[Run]]:
        """What this process holds, by sequence."""
        return self._model.held()

    def layouts(self) -> Mapping[int, Layout]:
        """Who holds what, as after the last step."""
        return self._model.layouts()

    def tables(self) -> list[messages.Table]:
        """What this process holds, for a rank 0 that does not know; one entry of ``held`` each, its own."""
        known = self._tokens.by_sequence
        return [
            messages.Table.of(sequence, known[sequence], [positions(mine)])
            for sequence, mine in self._model.held().items()
            if mine and sequence in known
        ]

    def _built(self, form: messages.Form) -> Ring:
        outcome: SimpleQueue[Ring | Exception] = SimpleQueue()
        with self._guard:
            if form.epoch < self._void:
                raise RingBrokenError(f"Epoch {form.epoch} was over before its ring was built.")
            self._awaited = (form.epoch, outcome)
        threading.Thread(target=self._build_into, args=(form, outcome), name="ring-build", daemon=True).start()
        built = outcome.get()
        with self._guard:
            self._awaited = None
        if not isinstance(built, Exception):
            return built
        with contextlib.suppress(Empty):
            while True:
                late = outcome.get_nowait()  # it was fenced, and yet it was built
                if not isinstance(late, Exception):
                    late.abort("nobody waits for it any more")
        raise built

    def _build_into(self, form: messages.Form, outcome: "SimpleQueue[Ring | Exception]") -> None:
        """On a thread of its own, as what it waits for cannot be woken. What comes too late is thrown away."""
        try:
            ring = self._build(form)
        except Exception as error:  # noqa: BLE001  (it is raised where it is waited for)
            outcome.put(error)
            return
        with self._guard:
            wanted = self._awaited is not None and self._awaited[1] is outcome
            if wanted:
                outcome.put(ring)
        if not wanted:
            ring.abort("nobody waits for it any more")


class Worker:
    """A rank that follows rank 0."""

    def __init__(
        self,
        *,
        place: Place,
        tether: Tether,
        inbox: "SimpleQueue[messages.AnyMessage | Severed | Left]",
        join: messages.Join,
    ) -> None:
        """``join`` is what it says of itself; its epoch and tables are filled in here."""
        self._place = place
        self._tether = tether
        self._inbox = inbox
        self._self = join
        self._rank = -1
        self.account = WorkerAccount()
        """As it was after the last order."""

    def leave(self) -> None:
        """Has :meth:`run` end, after the step under way; from a signal's handler too."""
        self._tether.leave()

    def outside(self) -> str | None:
        """Why this rank is in no ring that works, in a sentence; None where it is in one."""
        epoch, tether = self._place.epoch, self._tether
        if tether.leaving:
            return "This rank is told to end, and leaves its ring."
        if epoch >= 0 and tether.formed == epoch:
            return None
        if not tether.connected:
            return "Rank 0 does not answer; this rank keeps its KV and goes on trying."
        if epoch < 0:
            return "Rank 0 has formed no ring with this rank."
        return f"The ring of epoch {epoch} does not work yet: not all of its ranks are inside."

    def hung(self) -> str | None:
        """As :meth:`Place.hung`. Rank 0 has given up a step that takes so long, and this rank is in no ring until it ends."""
        return self._place.hung()

    def run(self) -> str | None:
        """Follows until it has left (None), or is refused (why)."""
        self._ask()
        while True:
            order = self._inbox.get()
            match order:
                case messages.Form():
                    self._form(order)
                case messages.Step():
                    self._step(order)
                case Severed():
                    log.warning("This rank is on its own: %s. It keeps its KV and looks for rank 0.", order.reason)
                    self._place.leave()
                    self._place.unfence()
                    self._ask()
                case messages.Refused():
                    return order.reason
                case Left():
                    log.info("This rank has left its ring.")
                    self._place.leave()
                    return None
                case _:
                    pass  # what workers say, rank 0 does not

    def _ask(self) -> None:
        mine = self._self
        self._tether.join(
            messages.Join(
                member=mine.member,
                world_size=mine.world_size,
                config_hash=mine.config_hash,
                capacity_tokens=mine.capacity_tokens,
                epoch=self._place.heard_of,
                tables=self._place.tables(),
            )
        )

    def _form(self, form: messages.Form) -> None:
        self._rank = form.rank
        try:
            self._place.form(form)
        except RingBrokenError as error:
            self._tether.send(messages.Fault(form.epoch, form.rank, BUILT, str(error), suspect(error)))
        else:
            held = sum(run.count for mine in self._place.held().values() for run in mine)
            self.account = replace(self.account, epoch=form.epoch, kv_tokens=held)
            self._tether.send(messages.Formed(form.epoch, form.rank))

    def _step(self, step: messages.Step) -> None:
        if step.epoch != self._place.epoch:
            return
        try:
            result = self._place.run(step)
        except RingBrokenError as error:
            self._place.leave()  # what comes after a step that broke is not to run, even where it needs nobody
            self._tether.send(fault(step, self._rank, error))
        else:
            said = done(step, self._rank, result)
            traffic = self.account.traffic.plus(said.traffic)
            self.account = replace(self.account, kv_tokens=result.held_tokens, traffic=traffic)
            self._tether.send(said)


def done(step: messages.Step, rank: int, result: StepResult) -> messages.Done:
    """What a rank says of a step it has finished."""
    traffic = messages.Traffic(
        seconds=result.seconds,
        compute_seconds=result.seconds - result.waited_seconds,
        waited_seconds=result.waited_seconds,
        sent_bytes=result.sent_bytes,
    )
    return messages.Done(step.epoch, rank, step.number, traffic)


def fault(step: messages.Step, rank: int, error: RingBrokenError) -> messages.Fault:
    """What a rank says of a step that broke."""
    return messages.Fault(step.epoch, rank, step.number, str(error), suspect(error))


def suspect(error: RingBrokenError) -> int | None:
    """The rank that was waited for in vain, where that is known."""
    return error.peers[0] if error.peers else None
