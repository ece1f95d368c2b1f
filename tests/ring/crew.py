"""Rank 0 and its workers as threads of this process, with real control connections and a model that is none.

The model's KV of a position is the token itself, and the next token is a hash of all of a sequence's tokens, gathered from
all ranks: whatever a recovery loses, duplicates or mixes up changes the tokens. Rings are rooms where all ranks meet;
whoever is aborted leaves with RingBrokenError, and a rank that is killed never comes.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch

from kvplane_runtime.ring import messages
from kvplane_runtime.ring.admission import Refusal
from kvplane_runtime.ring.communicator import RingBrokenError
from kvplane_runtime.ring.control import Hub, Left, Tether
from kvplane_runtime.ring.engine import About, Cancel, Leader, Shutdown, Submit
from kvplane_runtime.ring.layout import Layout
from kvplane_runtime.ring.membership import Limits
from kvplane_runtime.ring.model import StepResult
from kvplane_runtime.ring.ranges import Run
from kvplane_runtime.ring.requests import Ended, Failed, Policy, Request, Token
from kvplane_runtime.ring.sampling import Sampling
from kvplane_runtime.ring.worker import Place, Worker

VOCABULARY = 997
HOST = "127.0.0.1"
LIMIT_SECONDS = 2.0
"""Silence after which a rank is lost: on a busy machine a thread may not run for half a second now and then."""


def follow(tokens: Sequence[int]) -> int:
    """The token that comes after ``tokens``."""
    return int.from_bytes(hashlib.blake2b(repr(list(tokens)).encode(), digest_size=4).digest(), "big") % VOCABULARY


def answer(prompt: Sequence[int], count: int) -> list[int]:
    """What an engine without faults says."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(follow(tokens))
    return tokens[len(prompt) :]


class Room:
    """Where the ranks of one epoch meet."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._changed = threading.Condition()
        self._said: dict[tuple[str, int], dict[int, Any]] = {}

    def gather(self, what: tuple[str, int], rank: int, mine: Any, broken: Callable[[], str | None]) -> dict[int, Any]:
        with self._changed:
            said = self._said.setdefault(what, {})
            said[rank] = mine
            self._changed.notify_all()
            while len(said) < self._size:
                if reason := broken():
                    raise RingBrokenError(reason)
                self._changed.wait(0.02)
            return said


@dataclass
class FakeRing:
    epoch: int
    rank: int
    size: int
    room: Room
    reason: str | None = None

    def waited(self) -> float:
        return 0.0

    def abort(self, reason: str = "it was aborted") -> None:
        self.reason = self.reason or reason


class FakeModel:
    """Runs steps as :class:`kvplane_runtime.ring.model.RingModel` does."""

    def __init__(self, process: "Process") -> None:
        self._process = process
        self._ring: FakeRing | None = None
        self._layouts: dict[int, Layout] = {}
        self._kv: dict[int, dict[int, int]] = {}

    def held(self) -> Mapping[int, Sequence[Run]]:
        rank = self._ring.rank if self._ring else 0
        return {sequence: layout.runs(rank) for sequence, layout in self._layouts.items()}

    def layouts(self) -> Mapping[int, Layout]:
        return self._layouts

    def bind(self, ring: Any, layouts: Mapping[int, Layout] | None = None) -> None:
        assert layouts is not None
        kept = {}
        for sequence, layout in layouts.items():
            mine = {at for run in layout.runs(ring.rank) for part in run.ranges() for at in range(part.begin, part.end)}
            have = self._kv.get(sequence, {})
            assert mine <= have.keys(), f"sequence {sequence}: {sorted(mine - have.keys())[:5]} were never here"
            kept[sequence] = {at: have[at] for at in mine}
        self._kv = kept
        self._layouts = {sequence: layout.copy() for sequence, layout in layouts.items()}
        self._ring = ring

    def run(self, step: messages.Step) -> StepResult:
        ring = self._ring
        assert ring is not None
        assert ring.epoch == step.epoch
        self._process.step_began(step)
        for sequence in step.release:
            self._layouts.pop(sequence, None)
            self._kv.pop(sequence, None)
        for cut in step.truncate:
            self._layouts[cut.sequence].truncate(cut.length)
            self._kv[cut.sequence] = {at: t for at, t in self._kv[cut.sequence].items() if at < cut.length}
        for fork in step.fork:
            self._layouts[fork.child] = self._layouts[fork.parent].copy()
            self._layouts[fork.child].truncate(fork.length)
            self._kv[fork.child] = {at: t for at, t in self._kv[fork.parent].items() if at < fork.length}
        rows = [
            self._next(ring, step, decode.sequence, decode.position, {decode.position: decode.token})
            for decode in step.decode
        ]
        for decode in step.decode:
            rank = self._layouts[decode.sequence].append_token(decode.position)
            if rank == ring.rank:
                self._kv[decode.sequence][decode.position] = decode.token
        if window := step.window:
            layout = self._layouts.setdefault(window.sequence, Layout(ring.size))
            pieces = layout.pieces(window.start, len(window.tokens), window.placement)
            new = {
                at: window.tokens[at - window.start]
                for piece in pieces[ring.rank]
                for run in piece
                for part in run.ranges()
                for at in range(part.begin, part.end)
            }
            end = window.start + len(window.tokens)
            if window.placement == "zigzag" or window.logits:
                row = self._next(ring, step, window.sequence, end - 1, new)
                rows += [row] if window.logits else []
            layout.append(pieces)
            self._kv.setdefault(window.sequence, {}).update(new)
        if ring.reason:
            raise RingBrokenError(ring.reason)
        logits = torch.zeros(len(rows), VOCABULARY)
        for at, token in enumerate(rows):
            logits[at, token] = 1.0
        for at, decode in enumerate(step.decode):
            if decode.sequence in self._process.crew.nonsense:
                logits[at] = float("nan")
        held = sum(map(len, self._kv.values()))
        return StepResult(logits if rows and ring.rank == 0 else None, held, 0.001, 0.0, 8)

    def _next(self, ring: FakeRing, step: messages.Step, sequence: int, last: int, new: Mapping[int, int]) -> int:
        mine = {at: token for at, token in {**self._kv.get(sequence, {}), **new}.items() if at <= last}
        said = ring.room.gather(
            (f"step {sequence} {last}", step.number), ring.rank, mine, lambda: self._process.broken(ring)
        )
        tokens: dict[int, int] = {}
        for part in said.values():
            for at, token in part.items():
                assert tokens.setdefault(at, token) == token, f"position {at} is there twice, with two tokens"
        assert sorted(tokens) == list(range(last + 1)), f"sequence {sequence}: not all positions up to {last} are there"
        return follow([tokens[at] for at in range(last + 1)])


class Process:
    """One rank's process."""

    def __init__(self, crew: "Crew", ordinal: int) -> None:
        crew.started += 1
        self.crew = crew
        self.ordinal = ordinal
        self.name = f"p{crew.started}"
        self.killed = threading.Event()
        self.running = threading.Event()
        self.running.set()
        self.ended: str | None = None
        self.refused: str | None = None
        self.step = 0
        """The last that it began."""
        self.model = FakeModel(self)
        self.place = Place(model=self.model, build=self._build, clock=lambda: time.monotonic() + crew.later)
        self.join = messages.Join(
            messages.Member(ordinal, f"pod-{ordinal}", self.name, HOST),
            crew.size,
            crew.config_hash,
            crew.capacity,
        )

    def _build(self, form: messages.Form) -> Any:
        room = self.crew.room(form)
        ring = FakeRing(form.epoch, form.rank, len(form.members), room)
        room.gather(
            ("built", form.epoch),
            form.rank,
            None,
            lambda: "killed" if self.killed.is_set() else None if not self.over(form) else "over",
        )
        return ring

    def over(self, form: messages.Form) -> bool:
        return self.crew.closed

    def broken(self, ring: FakeRing) -> str | None:
        self.running.wait()
        return "killed" if self.killed.is_set() else ring.reason

    def step_began(self, step: messages.Step) -> None:
        self.running.wait()
        self.step = step.number
        for hook in list(self.crew.hooks):
            hook(self, step)
        if self.killed.is_set():  # also in a hook: the dead give nothing to a step
            raise RingBrokenError("killed")


class WorkerProcess(Process):
    def __init__(self, crew: "Crew", ordinal: int, **join: Any) -> None:
        super().__init__(crew, ordinal)
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        self.tether = Tether(
            host=HOST, port=crew.port, limits=crew.limits, deliver=self.inbox.put, fence=self.place.fence
        )
        said = messages.Join(**{name: getattr(self.join, name) for name in self.join.__struct_fields__} | join)
        self.worker = Worker(place=self.place, tether=self.tether, inbox=self.inbox, join=said)
        self.tether.start()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.refused = self.worker.run()
        except BaseException as error:
            self.ended = repr(error)
            raise

    def kill(self) -> None:
        """As SIGKILL does it: it says nothing more, not even that its ring broke, or it could be in the next one."""
        self.running.set()
        self.tether.stop()
        self.killed.set()
        self.inbox.put(Left())

    def stop(self) -> None:
        """As SIGSTOP does it: nothing of it runs until it is told to go on."""
        self.running.clear()
        self.tether._loop.post(self.running.wait)

    def go_on(self) -> None:
        """As SIGCONT does it."""
        self.running.set()


class LeaderProcess(Process):
    def __init__(self, crew: "Crew") -> None:
        super().__init__(crew, 0)
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        self.hub = Hub(
            join=self.join, host=HOST, port=crew.port, limits=crew.limits, tell=self.inbox.put, fence=self.place.fence
        )
        self.hub.start()
        crew.port = self.hub.port
        self.leader = Leader(
            about=About("ring-0", "fake", crew.size, crew.capacity, "nowhere:1"),
            place=self.place,
            hub=self.hub,
            inbox=self.inbox,
            policy=crew.policy,
            uniform=lambda: 0.5,
            clock=lambda: time.monotonic() + crew.later,
        )
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.leader.run()
        except BaseException as error:
            self.ended = repr(error)
            if not self.killed.is_set():
                raise

    def kill(self) -> None:
        self.killed.set()
        self.running.set()
        self.hub._loop.stop()
        self.inbox.put(Shutdown(Refusal(503, "killed", "killed")))


@dataclass
class Answer:
    """What a client has got of one request."""

    tokens: list[int] = field(default_factory=list)
    refusal: Refusal | None = None
    over: threading.Event = field(default_factory=threading.Event)
    first: threading.Event = field(default_factory=threading.Event)

    def tell(self, event: Any) -> None:
        match event:
            case Token():
                self.tokens.append(event.sampled.token)
                self.first.set()
            case Refusal():
                self.refusal = event
                self.over.set()
            case Failed():
                self.refusal = event.refusal
                self.over.set()
            case Ended():
                self.over.set()


class Crew:
    """All processes of one ring."""

    def __init__(
        self, size: int, *, capacity: int = 100_000, limits: Limits | None = None, policy: Policy | None = None
    ) -> None:
        self.size = size
        self.capacity = capacity
        self.limits = limits or Limits(heartbeat=LIMIT_SECONDS, stop=5.0, form=5.0, gather=0.3)
        self.policy = policy or Policy(window_tokens=16, short_tokens=8, prefix_block_tokens=16, park_seconds=30.0)
        self.config_hash = "1.0/abc"
        self.started = 0
        self.closed = False
        self.port = 0
        self.later = 0.0
        """Seconds that the leader's clock, and that by which ranks tell whether they hang, is ahead."""
        self.hooks: list[Callable[[Process, messages.Step], None]] = []
        self.nonsense: set[int] = set()
        """Sequences whose logits are no numbers when they decode."""
        self._rooms: dict[tuple[int, tuple[str, ...]], Room] = {}
        self._guard = threading.Lock()
        self._asked = 0
        self.leader = LeaderProcess(self)
        self.workers = {ordinal: WorkerProcess(self, ordinal) for ordinal in range(1, size)}

    def room(self, form: messages.Form) -> Room:
        key = (form.epoch, tuple(member.process for member in form.members))
        with self._guard:
            return self._rooms.setdefault(key, Room(len(form.members)))

    def ask(self, prompt: Sequence[int], count: int) -> Answer:
        got = Answer()
        self._asked += 1
        request = Request(f"r{self._asked}", list(prompt), count, Sampling(temperature=0.0))
        self.leader.inbox.put(Submit(request, got.tell))
        return got

    def cancel(self, number: int) -> None:
        self.leader.inbox.put(Cancel(f"r{number}"))

    def until(self, what: Callable[[], bool], *, seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not what():
            ended = [each.ended for each in (self.leader, *self.workers.values()) if each.ended]
            assert not ended, ended
            assert time.monotonic() < end, f"it does not come true; the ring is {self.leader.leader.state}"
            time.sleep(0.01)

    def formed(self, *members: int) -> None:
        """Waits for a ring of these ordinals."""

        def there() -> bool:
            state = self.leader.leader.state  # read once: it is another one at any time
            return state.formed and state.members == members

        self.until(there)

    def close(self) -> None:
        self.closed = True
        for worker in self.workers.values():
            worker.kill()
        self.leader.kill()
        for each in (self.leader, *self.workers.values()):
            each.thread.join(5.0)
