"""The control connections: one TCP connection from each worker to rank 0, length-prefixed messages, heartbeats both ways.

Each process runs its side on a thread of its own with its own event loop, because the thread that runs the model stands
in kernels for as long as a window takes, and must not miss a heartbeat for it. The two threads share no state: orders go
to the model's thread through a callback (that only puts them into its queue), and what it says comes back by
:meth:`_Loop.post`. One thing cannot wait in a queue: a fence must wake the model's thread out of its exchange, so it is
called at once, from this thread.

A heartbeat carries the epoch of the newest fence, and one with a later epoch than the receiver's ring *is* the fence: it
is said again every 0.2 s and cannot be lost.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from kvplane_runtime.ring import messages
from kvplane_runtime.ring.membership import (
    BUILT,
    SELF,
    Action,
    Candidate,
    Fence,
    Form,
    Formed,
    Identity,
    Limits,
    Lost,
    Membership,
    Phase,
    Refuse,
)

log = logging.getLogger(__name__)

BEAT_SECONDS: Final = 0.2
TICK_SECONDS: Final = 0.1
_RETRY_SECONDS: Final = 0.2
_CONNECT_SECONDS: Final = 2.0
_PATIENCE_SECONDS: Final = 5.0
"""A connection to a rank 0 that was just accepted may be silent for so long: it may have been accepted by the kernel of a
process that stands still."""
_LENGTH: Final = struct.Struct(">I")
_MAX_MESSAGE_BYTES: Final = 512 * 1024 * 1024
"""The tables of 130 million tokens; anything longer is no message of a rank."""
_UNKNOWN_SECONDS: Final = 60.0
"""Until it asks to be a member, a connection has to bring a whole message in this time: a rank that loads its weights beats
every 0.2 s, and what it holds, 4 bytes a token, takes less on any network that a ring can use."""
_UNKNOWN_BYTES: Final = 1024 * 1024
"""Longest message until then, beside the tokens: names, numbers, and the runs of positions that a rank holds."""
_UNKNOWN_BYTES_PER_TOKEN: Final = 16
"""The same for each KV token of a whole ring: four times what a token takes, for a rank 0 that has less room than the one
before, and for tokens whose KV nobody holds any more."""
_FAULT: Final = 70
"""Exit status after a fault of our own (EX_SOFTWARE)."""
_FOREVER: Final = 1 << 62
"""An epoch later than all."""


@dataclass(frozen=True, slots=True)
class Seat:
    """A member of a ring that is to be formed, and what is known of its KV."""

    link: int
    member: messages.Member
    capacity_tokens: int
    rank_before: int | None
    """In the ring before, whose layouts rank 0 knows; None: it was in none, or has left it since."""
    finished: int
    """The last step of that ring that it has surely finished."""
    tables: tuple[messages.Table, ...]
    """What one without ``rank_before`` says it holds; ``held`` has one entry, its own."""


@dataclass(frozen=True, slots=True)
class FormOrder:
    """Rank 0 is to write the ``Form`` of each seat, by rank."""

    epoch: int
    seats: tuple[Seat, ...]


@dataclass(frozen=True, slots=True)
class Severed:
    """A worker has no rank 0 any more, left its ring, and may ask to join again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Left:
    """A worker that is told to end is a member of no ring any more, and may."""


@dataclass(frozen=True, slots=True)
class Gone:
    """A process that said how far it was with its weights is not connected any more."""

    ordinal: int


Order = Fence | FormOrder | Formed | Lost | Gone | messages.Done | messages.Loading
"""What the hub tells the engine."""


class _Loop:
    """A thread with an event loop that runs one coroutine. Where that fails by our own fault, the process ends."""

    def __init__(self, name: str, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._main = main
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._running = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Returns when the loop takes calls."""
        self._thread.start()
        self._running.wait()

    def post(self, call: Callable[..., object], *arguments: object) -> None:
        """Has ``call`` made on the loop's thread, soon; never, where the loop has ended."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has been closed
                self._loop.call_soon_threadsafe(call, *arguments)

    def ask(self, call: Callable[..., bool], *arguments: object) -> bool:
        """The result of ``call``, made on the loop's thread; False where the loop has ended."""
        answer: Future[bool] = Future()

        def make() -> None:
            answer.set_result(call(*arguments))

        self.post(make)
        while self._thread.is_alive():
            with contextlib.suppress(TimeoutError):
                return answer.result(timeout=1.0)
        return False

    def stop(self) -> None:
        """Ends the coroutine, and waits for that."""
        if self._thread.is_alive() and self._task is not None:
            self.post(self._task.cancel)
            self._thread.join(timeout=5.0)

    def _run(self) -> None:
        try:
            with contextlib.suppress(asyncio.CancelledError):
                asyncio.run(self._whole())
        except BaseException:  # a rank whose control thread is gone looks alive to itself and dead to all others
            log.critical("The control thread failed; this process ends.", exc_info=True)
            os._exit(_FAULT)

    async def _whole(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._loop.set_exception_handler(_end_process)
        self._running.set()
        await self._main()


def _end_process(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """For what no coroutine of ours catches: a fault of our own must not leave half a rank behind."""
    error = context.get("exception")
    if isinstance(error, asyncio.CancelledError):
        return  # the loop ends; Python 3.11 asks the tasks of its connections for errors that they do not have
    if error is None or isinstance(error, OSError):
        loop.default_exception_handler(context)
        return
    log.critical("The control thread failed; this process ends.", exc_info=error)
    os._exit(_FAULT)


async def _receive(
    reader: asyncio.StreamReader, heard: Callable[[], None], *, most: int = _MAX_MESSAGE_BYTES
) -> messages.AnyMessage:
    """The next message, of at most ``most`` bytes; raises OSError, EOFError or MalformedMessageError. Calls ``heard`` for every
    part of it: one that carries the tokens of a long context may be on its way for longer than a peer may be silent.
    """
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > most:
        raise messages.MalformedMessageError(
            f"A message of {length} bytes is announced; none that may come here is longer than {most}."
        )
    data = bytearray()
    while len(data) < length:
        part = await reader.read(length - len(data))
        if not part:
            raise EOFError
        data += part
        heard()
    return messages.decode(data)


def _send(writer: asyncio.StreamWriter, message: messages.AnyMessage) -> None:
    """Never waits: who does not read is found out by its silence."""
    _send_encoded(writer, messages.encode(message))


def _send_encoded(writer: asyncio.StreamWriter, head: bytes, rest: bytes = b"") -> None:
    """One message in two parts; the second is not joined to the first, as it may be long."""
    if not writer.is_closing():
        writer.write(_LENGTH.pack(len(head) + len(rest)) + head)
        writer.write(rest)


def identity(config_hash: str, world_size: int) -> Identity:
    """As it is compared; ``config_hash`` is ``VERSION/HASH``."""
    version, _, rest = config_hash.partition("/")
    return Identity(world_size, version, rest)


class Hub:
    """Rank 0's side: hears the workers, runs the membership, and passes on what rank 0 decides.

    ``tell`` and ``fence`` are called on the hub's thread and must return at once. ``fence`` is to wake the model's thread
    out of any ring of an older epoch.
    """

    def __init__(
        self,
        *,
        join: messages.Join,
        host: str,
        port: int,
        limits: Limits,
        tell: Callable[[Order], None],
        fence: Callable[[int, str], None],
    ) -> None:
        self._join = join
        self._host, self._port = host, port
        self.port = port
        """Where it listens, once it has started; given as 0, a free one."""
        self._tell, self._fence = tell, fence
        self._membership = Membership(leader=_candidate(join), limits=limits, now=time.monotonic())
        self._joins: dict[int, messages.Join] = {SELF: join}
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._numbers = itertools.count(SELF + 1)
        self._seats: dict[int, int] = {}
        """Rank by link in the last ring whose forms were sent."""
        self._finished: dict[int, int] = {}
        """Last finished step by link, in that ring."""
        self._loading: dict[int, int] = {}
        """Ordinal by link, of who said how far it was with its weights."""
        self._unwritten: FormOrder | None = None
        """An order whose forms rank 0 has not given yet."""
        tokens = join.world_size * join.capacity_tokens
        self._most_unknown = min(_UNKNOWN_BYTES + _UNKNOWN_BYTES_PER_TOKEN * tokens, _MAX_MESSAGE_BYTES)
        """Longest message of who has not asked to be a member yet."""
        self._beat_epoch = join.epoch
        self._sending: asyncio.Task[None] | None = None
        """Of the forms; kept, since a loop does not keep its tasks."""
        self._listening = threading.Event()
        self._failure: OSError | None = None
        self._loop = _Loop("ring-hub", self._run)

    # For the model's thread.

    def start(self) -> None:
        """Returns when the port is open; raises OSError if it cannot be."""
        self._loop.start()
        self._listening.wait()
        if self._failure:
            raise self._failure

    def stop(self) -> None:
        """Closes the port and all connections. The workers keep what they hold, and look for the next rank 0."""
        self._loop.stop()

    def step(self, step: messages.Step) -> None:
        """Sends a step to all workers; dropped if its ring is over, of which rank 0 hears by its fence."""
        self._loop.post(self._pass_step, step)

    def form(self, epoch: int, forms: Mapping[int, messages.Form]) -> bool:
        """Sends each link its form, of the same tables; False if something has happened since the order, so that there will be
        another.
        """
        return self._loop.ask(self._pass_forms, epoch, *messages.encode_forms(forms))

    def answer(self, message: messages.Formed | messages.Done | messages.Fault) -> None:
        """What rank 0's own model did."""
        self._loop.post(self._take, SELF, message)

    def stopped(self, epoch: int) -> None:
        """Rank 0's model is in no ring, as the fence of ``epoch`` asked."""
        self._loop.post(lambda: self._carry_out(self._membership.stopped(epoch, time.monotonic())))

    # On the hub's thread.

    async def _run(self) -> None:
        try:
            server = await asyncio.start_server(self._serve, self._host, self._port, backlog=1024)
            self.port = server.sockets[0].getsockname()[1]
        except OSError as error:
            self._failure = error
            return
        finally:
            self._listening.set()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._beat())
            try:
                while True:
                    self._carry_out(self._membership.tick(time.monotonic()))
                    await asyncio.sleep(TICK_SECONDS)
            finally:
                server.close()
                for writer in self._writers.values():
                    writer.close()

    async def _beat(self) -> None:
        while True:
            self._beat_all()
            await asyncio.sleep(BEAT_SECONDS)

    def _beat_all(self) -> None:
        beat = messages.Heartbeat(self._beat_epoch, formed=self._membership.phase is Phase.FORMED)
        for writer in self._writers.values():
            _send(writer, beat)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = next(self._numbers)
        self._writers[link] = writer
        reason = "its connection closed"
        try:
            while True:
                message = await self._next(link, reader)
                if link not in self._writers:  # it was sent away, and this had come before
                    break
                self._take(link, message)
        except EOFError:
            pass
        except OSError as error:
            reason = f"its connection broke ({error})"
        except messages.MalformedMessageError as error:
            reason = str(error)
            _send(writer, messages.Refused(reason))
            log.warning("Somebody at %s was sent away: %s", writer.get_extra_info("peername"), error)
        finally:
            self._drop(link)
            self._carry_out(self._membership.disconnected(link, time.monotonic(), reason))

    async def _next(self, link: int, reader: asyncio.StreamReader) -> messages.AnyMessage:
        """The next message over a link; raises as :func:`_receive`. Who has not asked to be a member yet is nobody whose silence
        the membership watches, and may be anybody: it gets little time and little room.
        """

        def heard() -> None:
            self._membership.heard(link, time.monotonic())

        if link in self._joins:
            return await _receive(reader, heard)
        async with asyncio.timeout(_UNKNOWN_SECONDS):  # TimeoutError is an OSError
            return await _receive(reader, heard, most=self._most_unknown)

    def _take(self, link: int, message: messages.AnyMessage) -> None:
        now = time.monotonic()
        membership = self._membership
        match message:
            case messages.Join():
                if link in self._joins:  # no rank does; it would be taken for one that is back over a new connection
                    raise messages.MalformedMessageError("It asks to be a member twice over one connection.")
                self._joins[link] = message
                self._carry_out(membership.joined(link, _candidate(message), now))
            case messages.Formed():
                self._carry_out(membership.done(link, message.epoch, BUILT, now))
            case messages.Done():
                if message.epoch == membership.ring and link in self._finished:
                    self._finished[link] = message.number
                    self._tell(message)
                self._carry_out(membership.done(link, message.epoch, message.number, now))
            case messages.Fault():
                self._carry_out(
                    membership.broken(link, message.epoch, message.number, message.reason, now, suspect=message.suspect)
                )
            case messages.Loading():
                self._loading[link] = message.ordinal
                self._tell(message)
            case messages.Leave():
                self._carry_out(membership.leaves(link, now))
            case _:
                pass  # a heartbeat says no more than that it came, which was heard

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Fence():
                    self._carry_out_fence(action)
                case Form():
                    self._order(action)
                case Formed():
                    log.info(
                        "Epoch %d: a ring of ranks %s, after %.2f s.", action.epoch, action.ordinals, action.seconds
                    )
                    self._tell(action)
                case Lost():
                    log.warning("Rank %d is lost: %s.", action.ordinal, action.reason)
                    self._drop(action.link)
                    self._tell(action)
                case Refuse():
                    log.error("%s", action.reason)
                    if writer := self._writers.get(action.link):
                        _send(writer, messages.Refused(action.reason))
                    self._drop(action.link)

    def _carry_out_fence(self, fence: Fence) -> None:
        log.info("Epoch %d begins: %s.", fence.epoch, fence.reason)
        if fence.abort:
            self._beat_epoch = fence.epoch
            self._beat_all()
            self._fence(fence.epoch, fence.reason)
        self._tell(fence)
        if self._unwritten is not None and fence.abort:
            self._unwritten = None
            self._carry_out(self._membership.withdrawn(time.monotonic()))

    def _order(self, form: Form) -> None:
        seats = []
        for link in form.links:
            join = self._joins[link]
            rank_before = self._seats.get(link)
            seats.append(
                Seat(
                    link=link,
                    member=join.member,
                    capacity_tokens=join.capacity_tokens,
                    rank_before=rank_before,
                    finished=self._finished.get(link, BUILT),
                    tables=tuple(join.tables) if rank_before is None else (),
                )
            )
        self._unwritten = FormOrder(form.epoch, tuple(seats))
        self._tell(self._unwritten)

    def _pass_forms(self, epoch: int, heads: Mapping[int, bytes], rest: bytes) -> bool:
        if self._unwritten is None or self._unwritten.epoch != epoch:
            return False
        order, self._unwritten = self._unwritten, None
        self._seats = {seat.link: rank for rank, seat in enumerate(order.seats)}
        self._finished = dict.fromkeys(self._seats, BUILT)
        for link in self._seats:  # what it brought is in the tables of the ring now
            self._joins[link] = msgspec.structs.replace(self._joins[link], tables=[])
        self._beat_epoch = epoch
        self._sending = asyncio.create_task(self._send_forms(heads, rest))
        return True

    async def _send_forms(self, heads: Mapping[int, bytes], rest: bytes) -> None:
        """One after the other, with heartbeats between them: each has all tokens of the ring, of which a copy is made for what
        the network does not take at once.
        """
        for link, head in heads.items():
            if writer := self._writers.get(link):
                _send_encoded(writer, head, rest)
            await asyncio.sleep(0)

    def _pass_step(self, step: messages.Step) -> None:
        if self._membership.send(step.epoch, step.number):
            data = messages.encode(step)
            for link in self._seats:
                if writer := self._writers.get(link):
                    _send_encoded(writer, data)

    def _drop(self, link: int) -> None:
        self._joins.pop(link, None)
        self._seats.pop(link, None)
        self._finished.pop(link, None)
        ordinal = self._loading.pop(link, None)
        if ordinal is not None and ordinal not in self._loading.values():  # else it is back over a new connection
            self._tell(Gone(ordinal))
        if writer := self._writers.pop(link, None):
            writer.close()


class Tether:
    """A worker's side: finds rank 0, again and again, and keeps it informed.

    ``deliver`` and ``fence`` are called on the tether's thread and must return at once.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        limits: Limits,
        deliver: Callable[[messages.AnyMessage | Severed | Left], None],
        fence: Callable[[int, str], None],
    ) -> None:
        self._host, self._port = host, port
        self._limit = limits.heartbeat
        self._deliver, self._fence = deliver, fence
        self._writer: asyncio.StreamWriter | None = None
        self._join: messages.Join | None = None
        self._joined = False
        """The join was sent over the connection there is."""
        self.leaving = False
        """This process is told to end."""
        self.formed = -1
        """Epoch of the ring that works, by rank 0's last heartbeat; -1: none does. Any thread may read it, as ``leaving``."""
        self._epoch = -1
        self._fenced = -1
        self._heard = 0.0
        self._loop = _Loop("ring-tether", self._run)

    # For other threads.

    def start(self) -> None:
        self._loop.start()

    def stop(self) -> None:
        self._loop.stop()

    @property
    def connected(self) -> bool:
        """Whether there is a connection to rank 0."""
        return self._writer is not None

    def join(self, join: messages.Join) -> None:
        """Asks to be a member, over every new connection until the next ``Severed``."""
        self._loop.post(self._set_join, join)

    def leave(self) -> None:
        """Asks to be let go. ``Left`` is delivered then, or at once where no ring counts on this process."""
        self._loop.post(self._say_leave)

    def send(self, message: messages.AnyMessage) -> None:
        """Says something to rank 0; dropped while there is none."""
        self._loop.post(self._say, message)

    # On the tether's thread.

    async def _run(self) -> None:
        quiet = False
        while True:
            try:
                async with asyncio.timeout(_CONNECT_SECONDS):
                    reader, writer = await asyncio.open_connection(self._host, self._port)
            except (OSError, TimeoutError) as error:
                if not quiet:
                    log.info("Rank 0 at %s:%d does not answer yet (%s).", self._host, self._port, error)
                quiet = True
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            quiet = False
            reason = await self._session(reader, writer)
            await asyncio.sleep(_RETRY_SECONDS)
            log.info("The connection to rank 0 ended: %s.", reason)

    async def _session(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        """Until the connection ends, or rank 0 is silent for too long; why."""
        self._writer = writer
        self._heard = time.monotonic()
        if self._join is not None:
            self._say_join()
        watch = asyncio.create_task(self._watch())
        read = asyncio.create_task(self._read(reader))
        try:
            done, _ = await asyncio.wait({watch, read}, return_when=asyncio.FIRST_COMPLETED)
            reason = done.pop().result()
        finally:
            for task in (watch, read):
                task.cancel()
            self._writer = None
            self.formed = -1
            writer.close()
        if self._joined:
            self._joined = False
            self._epoch = self._fenced = -1  # the next rank 0 may give epochs that this one had fenced
            self._fence(_FOREVER, reason)
            self._deliver(Left() if self.leaving else Severed(reason))
        return reason

    async def _read(self, reader: asyncio.StreamReader) -> str:
        try:
            while True:
                self._take(await _receive(reader, self._hear))
        except EOFError:
            return "rank 0 closed it"
        except OSError as error:
            return f"it broke ({error})"
        except messages.MalformedMessageError as error:
            return str(error)

    async def _watch(self) -> str:
        """Beats, and returns when rank 0 has been silent for too long."""
        patience = max(self._limit, _PATIENCE_SECONDS)
        beaten = time.monotonic()
        started = self._heard
        while True:
            self._say(messages.Heartbeat(self._epoch))
            await asyncio.sleep(BEAT_SECONDS)
            now = time.monotonic()
            if now - beaten > BEAT_SECONDS + self._limit / 2:
                self._heard += now - beaten  # this process stood still: rank 0's heartbeats wait in the socket
            beaten = now
            limit = patience if self._heard == started else self._limit
            if now - self._heard > limit:
                return f"rank 0 was silent for {now - self._heard:.2f} s, more than the limit of {limit:g} s"

    def _hear(self) -> None:
        self._heard = time.monotonic()

    def _take(self, message: messages.AnyMessage) -> None:
        match message:
            case messages.Heartbeat():
                self.formed = message.epoch if message.formed else -1
                if self._epoch >= 0 and message.epoch > max(self._epoch, self._fenced):
                    self._fenced = message.epoch
                    self._fence(message.epoch, "rank 0 fenced it")
            case messages.Form():
                self._epoch = message.epoch
                self._deliver(message)
            case _:
                self._deliver(message)

    def _say_leave(self) -> None:
        self.leaving, self._join = True, None
        if self._joined:
            self._say(messages.Leave())
        else:
            self._deliver(Left())

    def _set_join(self, join: messages.Join) -> None:
        if self.leaving:
            return
        self._join = join
        if self._writer is not None and not self._joined:
            self._say_join()

    def _say_join(self) -> None:
        if self._join is not None:
            self._say(self._join)
            self._joined, self._join = True, None

    def _say(self, message: messages.AnyMessage) -> None:
        if self._writer is not None:
            _send(self._writer, message)


def _candidate(join: messages.Join) -> Candidate:
    return Candidate(
        ordinal=join.member.ordinal,
        pod=join.member.pod_uid,
        process=join.member.process,
        identity=identity(join.config_hash, join.world_size),
        epoch=join.epoch,
    )
