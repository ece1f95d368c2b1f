"""The ring of one epoch: who talks to whom, and how nobody waits for the dead. The only module on torch.distributed.

Each epoch has a process group of its own, under its own prefix of the rendezvous store, and never the default group: a
ring that broke is left behind as it is, and the next one is made by the same processes with their memory untouched.

On CPUs the group is gloo's. A wait in gloo cannot be woken: not by ``abort`` of the group, and a peer that was stopped is
noticed only by the timeout. So nobody but a thread of this ring's own ever waits for the network. The model's thread waits
for that thread, and :meth:`Ring.abort`, from any thread, wakes it with RingBrokenError; the waiting thread is left to its
timeout.

On GPUs it is NCCL's. Its operations are kernels on a stream of their own, one behind the other in the order in which they
were posted: the model's stream waits for them, by events, and its thread goes on. So the thread learns only in
:meth:`Ring.settle`, which ends each pass, whether all went well, and an operation must never wait for one that its own rank
posts later. A kernel that waits for the dead ends by the group's ``abort``. No GPU has run this part yet.

Nothing is reduced by the network: results are gathered and merged by rank, so that all ranks compute the same bits.
"""

import datetime
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

Store = dist.Store

FORM_SECONDS: Final = 30.0
"""Longest time for all members to come to a new ring."""
QUIET_SECONDS: Final = 60.0
"""Longest silence of a peer in the midst of a step. Whether a rank lives is for heartbeats to say, which are much faster;
this bounds how long what was left behind keeps its buffers."""
PATIENT_SECONDS: Final = 600.0
"""The same, where a peer computes alone for as long as it takes before it sends: a window that lies whole on it."""
CPU: Final = torch.device("cpu")
_SETTLE_POLL_SECONDS: Final = 50e-6
_Event: Final[Any] = torch.cuda.Event  # which is untyped
_NCCL: Final[Mapping[str, str]] = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",
    "TORCH_NCCL_BLOCKING_WAIT": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}
"""Its watchdog ends the communicator after a fault, and never the process: the KV in it is healthy. Nor does its monitor."""


class RingBrokenError(Exception):
    """The ring of this epoch works no more: a peer is gone or silent, or the ring was aborted. The KV held is untouched."""

    def __init__(self, message: str, *, peers: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.peers = tuple(peers)
        """The ranks that were waited for; empty where that is not known."""


@dataclass(slots=True)
class Traffic:
    """What went over the ring since it was made."""

    operations: int = 0
    sent_bytes: int = 0
    waited_seconds: float = 0.0
    """Time that the model stood still for communication; on a GPU its stream, as far as the ring has settled."""


def serve(*, host: str, port: int = 0) -> tuple[Store, int]:
    """A rendezvous store in this process, and its port (a free one for 0)."""
    store = dist.TCPStore(host, port, None, is_master=True, wait_for_workers=False)
    return store, store.port


def connect(*, host: str, port: int, seconds: float = FORM_SECONDS) -> Store:
    """The store that another process serves; raises RingBrokenError if it does not answer in time.

    Where its process stands still after the kernel has taken the connection, this waits until it goes on or ends.
    """
    try:
        return dist.TCPStore(
            host, port, None, is_master=False, timeout=datetime.timedelta(seconds=seconds), wait_for_workers=False
        )
    except RuntimeError as error:
        raise RingBrokenError(
            f"The rendezvous store at {host}:{port} did not answer in {seconds:g} s ({error})."
        ) from error


@dataclass(slots=True, eq=False)
class Pending:
    """Communication under way."""

    ring: "Ring"
    works: list[dist.Work]
    buffers: list[Tensor]
    """Kept from being freed or reused until all is done."""
    peers: tuple[int, ...]
    quiet: datetime.timedelta
    queued: bool = False
    broken: bool = False
    done: threading.Lock = field(default_factory=threading.Lock)
    """Held until it is over."""

    def wait(self) -> None:
        """Returns when all of it is done, or on a GPU, when the model's stream will wait for it; raises RingBrokenError."""
        if self.ring._streams is not None:
            self.ring._follow(self)
            return
        ring = self.ring
        begin = ring._waits_since = time.perf_counter()
        ring._queue_up(self)
        self.done.acquire()
        self.done.release()
        ring.traffic.waited_seconds += time.perf_counter() - begin
        ring._waits_since = None
        if self.broken:
            raise ring._reason()


class _Streams:
    """The model's stream on a GPU, and how long it stood still."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._waits: list[tuple[Any, Any]] = []
        """Before and behind each wait; they can be read when the stream has passed them."""

    def wait(self, works: Sequence[dist.Work]) -> None:
        """What is computed from now on comes after ``works``. Returns at once."""
        begin = self.mark(timed=True)
        for work in works:
            work.wait()
        self._waits.append((begin, self.mark(timed=True)))

    def mark(self, *, timed: bool = False) -> Any:
        """An event behind all that the stream was given."""
        event = _Event(enable_timing=timed)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def waited_seconds(self) -> float:
        """Of the waits since the last call; all of them must be over."""
        waits, self._waits = self._waits, []
        return float(sum(begin.elapsed_time(end) for begin, end in waits)) / 1000


class Ring:
    """One epoch's ring, seen from one of its ranks. All ranks must call the same operations in the same order."""

    def __init__(
        self,
        *,
        epoch: int,
        rank: int,
        size: int,
        group: Any,
        quiet_seconds: float = QUIET_SECONDS,
        device: torch.device = CPU,
    ) -> None:
        """Use :meth:`form`, or :meth:`alone`. ``group``: a backend of torch, whose types lack what is used; None for one rank."""
        self.epoch = epoch
        self.rank = rank
        self.size = size
        self.traffic = Traffic()
        self._group = group
        self._streams = _Streams(device) if device.type == "cuda" else None
        self._quiet = datetime.timedelta(seconds=quiet_seconds)
        self._guard = threading.Lock()
        """Of what is under way and of the end: what was posted before the end is waited for, and after it nothing is."""
        self._under_way: set[Pending] = set()
        self._waits_since: float | None = None
        """Since when the model's thread waits for others; None while it does not."""
        self._broken: RingBrokenError | None = None
        self._queue: SimpleQueue[Pending | None] = SimpleQueue()
        if group is not None:
            threading.Thread(target=self._finish_all, name=f"ring-epoch-{epoch}", daemon=True).start()

    @classmethod
    def alone(cls, *, epoch: int = 0, device: torch.device = CPU) -> "Ring":
        """A ring of one, which needs no network."""
        return cls(epoch=epoch, rank=0, size=1, group=None, device=device)

    @classmethod
    def form(
        cls,
        *,
        store: Store,
        epoch: int,
        rank: int,
        size: int,
        address: str,
        form_seconds: float = FORM_SECONDS,
        quiet_seconds: float = QUIET_SECONDS,
        device: torch.device = CPU,
    ) -> "Ring":
        """Makes the ring with all members of ``epoch``, each calling this; ``address`` is this rank's own host or IP.

        ``device`` is where the tensors lie that go over it: a GPU, with its index, or a CPU's memory. ``store`` is for this call
        alone: while one thread waits in a connection to it, no other gets through.
        Returns when all are connected. Raises RingBrokenError if they are not in ``form_seconds``; its ``peers`` are those that
        did not come at all.
        """
        if size == 1:
            return cls.alone(epoch=epoch, device=device)
        own = dist.PrefixStore(f"epoch-{epoch}", store)
        limit = datetime.timedelta(seconds=form_seconds)
        try:
            own.set_timeout(limit)
            own.set(_here(rank), "yes")
            gpu = device.type == "cuda"
            group = _nccl(own, rank, size, device, limit) if gpu else _gloo(own, rank, size, address, limit)
        except (RuntimeError, OSError) as error:
            raise RingBrokenError(
                f"The ring of epoch {epoch} did not form: "
                f"rank {rank} of {size} waited {form_seconds:g} s for the others ({error}).",
                peers=_absent(own, size),
            ) from error
        # Gathers have the group's limit, sends and receives that of their waits; until here it was that of forming.
        group._set_default_timeout(datetime.timedelta(seconds=quiet_seconds))
        return cls(epoch=epoch, rank=rank, size=size, group=group, quiet_seconds=quiet_seconds, device=device)

    # What the model does.

    @property
    def next(self) -> int:
        return (self.rank + 1) % self.size

    @property
    def previous(self) -> int:
        return (self.rank - 1) % self.size

    @property
    def _others(self) -> tuple[int, ...]:
        return tuple(rank for rank in range(self.size) if rank != self.rank)

    def post(
        self,
        *,
        sends: Sequence[tuple[Tensor, int]] = (),
        receives: Sequence[tuple[Tensor, int]] = (),
        tag: int = 0,
        later: bool = False,
        patient: bool = False,
    ) -> Pending:
        """Starts sending contiguous tensors to ranks and receiving into contiguous tensors from ranks.

        Between two ranks, messages of one tag arrive in the order in which they were posted. What is posted together is one
        operation, and may not depend on what is posted after it. It is watched in that order too; ``later``: from ``wait`` on,
        so that nothing that is posted after it waits for it (on CPUs; NCCL has one order). ``patient``: the peer may compute for
        long before it sends.
        """

        def start(group: Any) -> list[dist.Work]:
            if self._streams is None:
                return _exchange(group, sends, receives, tag)
            group._start_coalescing()
            _exchange(group, sends, receives, tag)
            whole = group._end_coalescing()
            return [] if whole is None else [whole]

        return self._start(
            start,
            buffers=[tensor for tensor, _ in (*sends, *receives)],
            peers=tuple(peer for _, peer in (*receives, *sends)),
            sent=sum(tensor.numel() * tensor.element_size() for tensor, _ in sends),
            later=later,
            quiet=datetime.timedelta(seconds=PATIENT_SECONDS) if patient else self._quiet,
        )

    def all_gather(self, mine: Tensor, everyone: Tensor) -> None:
        """Fills ``everyone`` [N, ...] with what each rank gave as ``mine`` [...], by rank; all contiguous, of equal size."""
        if self.size == 1:
            everyone.copy_(mine.unsqueeze(0))
            return
        self._start(
            lambda group: [group._allgather_base(everyone.view(-1), mine.view(-1))],
            buffers=[mine, everyone],
            peers=self._others,
            sent=mine.numel() * mine.element_size() * (self.size - 1),
        ).wait()

    def settle(self) -> None:
        """Returns when the device has done all that this thread gave it; raises RingBrokenError if the ring broke meanwhile.

        On a CPU all is done when it was waited for.
        """
        if self._streams is None:
            return
        end, until = self._streams.mark(), time.monotonic() + self._quiet.total_seconds()
        while not end.query() and self._broken is None:
            self._check_group()
            if time.monotonic() > until and self.size > 1:
                self._lose(TimeoutError(f"nothing came for {self._quiet.total_seconds():g} s"), self._others)
            time.sleep(_SETTLE_POLL_SECONDS)
        self._check_group()  # a communicator that has failed lets its kernels end
        if self._broken is not None:
            raise self._reason()
        self.traffic.waited_seconds += self._streams.waited_seconds()

    def _check_group(self) -> None:
        """Takes in what NCCL's watchdog has found."""
        group = self._group
        if group is not None and self._broken is None and (found := group.get_error().name) != "SUCCESS":
            self._lose(RuntimeError(f"NCCL says {found}"), self._others)

    def abort(self, reason: str = "it was aborted") -> None:
        """Ends the ring, from any thread: all that wait, now or later, get RingBrokenError."""
        self._end(RingBrokenError(f"The ring of epoch {self.epoch} is broken: {reason}."))

    def check(self) -> None:
        """Raises RingBrokenError if the ring works no more."""
        if self._broken is not None:
            raise self._reason()

    def waited(self) -> float:
        """Seconds that the model's thread waited for others so far, a wait under way included (on a GPU: as far as the ring has
        settled). From any thread.
        """
        since = self._waits_since  # read first: a wait that ends now counts twice for a moment, rather than not at all
        return self.traffic.waited_seconds + (0.0 if since is None else time.perf_counter() - since)

    @property
    def broken(self) -> RingBrokenError | None:
        """Why it works no more; None while it does."""
        return self._broken

    def _start(
        self,
        start: Callable[[Any], list[dist.Work]],
        *,
        buffers: list[Tensor],
        peers: tuple[int, ...],
        sent: int,
        later: bool = False,
        quiet: datetime.timedelta | None = None,
    ) -> Pending:
        pending = Pending(self, [], buffers, peers, quiet or self._quiet)
        pending.done.acquire()
        try:
            if self._streams is not None:  # NCCL may wait for a peer here, and an abort must get through
                pending.works = start(self._alive())
            else:
                with self._guard:
                    pending.works = start(self._alive())
                    self._under_way.add(pending)
                    if not later:
                        self._queue_up(pending)
        except RuntimeError as error:
            self._lose(error, peers)
            raise self._reason() from error
        self.traffic.operations += 1
        self.traffic.sent_bytes += sent
        return pending

    def _follow(self, pending: Pending) -> None:
        """Has the model's stream wait."""
        assert self._streams is not None  # noqa: S101  (only on GPUs)
        try:
            self._streams.wait(pending.works)
        except RuntimeError as error:
            self._lose(error, pending.peers)
        pending.works, pending.buffers = [], []
        if self._broken is not None:
            raise self._reason()

    def _alive(self) -> Any:
        group = self._group  # read first: it goes when the ring is broken
        if self._broken is not None:
            raise self._reason()
        if group is None:
            raise ValueError("A ring of one has nobody to talk to.")
        return group

    # The thread that waits.

    def _queue_up(self, pending: Pending) -> None:
        if not pending.queued:
            pending.queued = True
            self._queue.put(pending)

    def _finish_all(self) -> None:
        while (pending := self._queue.get()) is not None:
            try:
                for work in pending.works:
                    work.wait(pending.quiet)
            except Exception as error:  # noqa: BLE001  (whoever waits for this thread has to hear of it)
                self._lose(error, pending.peers)
            with self._guard:
                finished = pending in self._under_way
                self._under_way.discard(pending)
            pending.works, pending.buffers = [], []
            if finished:
                pending.done.release()
        # Only now, when nothing is under way any more: a group of gloo that is freed earlier joins its threads, and they wait.
        group, self._group = self._group, None
        if self._streams is not None:
            group.abort()  # what its kernels wait for will not come

    def _lose(self, error: Exception, peers: Sequence[int]) -> None:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        ranks = ", ".join(str(peer) for peer in sorted(set(peers)))
        self._end(
            RingBrokenError(
                f"The ring of epoch {self.epoch} is broken: rank {self.rank} lost rank {ranks} ({what}).", peers=peers
            )
        )

    def _end(self, why: RingBrokenError) -> None:
        """The first reason stays."""
        with self._guard:
            self._broken = self._broken or why
            under_way, self._under_way = self._under_way, set()
            for pending in under_way:
                pending.broken = True
                self._queue_up(pending)  # what nobody waits for yet ends before the group does, too
            self._queue.put(None)
        for pending in under_way:
            pending.done.release()

    def _reason(self) -> RingBrokenError:
        """Why it works no more. A new one each time: an error that was raised keeps frames, and with them their tensors."""
        why = self._broken
        return RingBrokenError(str(why), peers=() if why is None else why.peers)


def _here(rank: int) -> str:
    """Key of the store under which a rank says that it has come."""
    return f"here-{rank}"


def _absent(store: Store, size: int) -> tuple[int, ...]:
    """The ranks that have not come; empty where the store does not say."""
    try:
        return tuple(rank for rank in range(size) if not store.check([_here(rank)]))
    except (RuntimeError, OSError):
        return ()


def _gloo(store: Store, rank: int, size: int, address: str, limit: datetime.timedelta) -> Any:
    """A group over TCP, connected; raises RuntimeError or OSError."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    # Resolved here: gloo would do it with the interpreter's lock held, and no thread could send a heartbeat meanwhile.
    number = str(socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0])
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=number)]
    options._timeout = limit
    return dist.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: Store, rank: int, size: int, device: torch.device, limit: datetime.timedelta) -> Any:
    """A group between GPUs, connected; raises RuntimeError."""
    os.environ.update(_NCCL)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    group = dist.ProcessGroupNCCL(store, rank, size, options)
    group.eager_connect_single_device(device)
    return group


def _exchange(
    group: Any, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], tag: int
) -> list[dist.Work]:
    works = [group.send([tensor], peer, tag) for tensor, peer in sends]
    return works + [group.recv([tensor], peer, tag) for tensor, peer in receives]
