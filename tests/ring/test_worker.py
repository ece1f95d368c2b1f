"""A rank's place in its rings, and a worker that follows: no step runs in a ring that is over, and no ring is left open."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import Any

import pytest

from kvplane_runtime.ring import messages
from kvplane_runtime.ring.communicator import PATIENT_SECONDS, RingBrokenError
from kvplane_runtime.ring.control import Left, Severed
from kvplane_runtime.ring.layout import Layout
from kvplane_runtime.ring.membership import BUILT
from kvplane_runtime.ring.model import StepResult
from kvplane_runtime.ring.ranges import Run
from kvplane_runtime.ring.state import RankTraffic, WorkerAccount
from kvplane_runtime.ring.worker import Place, Worker

MEMBER = messages.Member(1, "pod-1", "p1", "127.0.0.1")


class Ring:
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.reason: str | None = None
        self.seconds = 0.0
        """Waited."""

    def waited(self) -> float:
        return self.seconds

    def abort(self, reason: str = "it was aborted") -> None:
        self.reason = self.reason or reason


class Model:
    """Runs what it is told to, but for the steps that are to break."""

    def __init__(self, *broken: int) -> None:
        self._broken = broken
        self.bound: list[int] = []
        self.ran: list[int] = []

    def bind(self, ring: Any, layouts: Mapping[int, Layout] | None = None) -> None:
        self.bound.append(ring.epoch)

    def run(self, step: messages.Step) -> StepResult:
        self.ran.append(step.number)
        if step.number in self._broken:
            raise RingBrokenError("rank 2 is gone", peers=(2,))
        return StepResult(None, 7, 1.0, 0.25, 8)

    def held(self) -> Mapping[int, Sequence[Run]]:
        return {5: (Run(0, 3),)}

    def layouts(self) -> Mapping[int, Layout]:
        return {}


def form(epoch: int) -> messages.Form:
    return messages.Form(epoch, 1, [MEMBER], "s:1", [messages.Table.of(5, [1, 2, 3], [[], [messages.Positions(0, 3)]])])


def place(
    model: Model,
    build: Callable[[messages.Form], Any] = lambda form: Ring(form.epoch),
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Place:
    return Place(model=model, build=build, form_seconds=20.0, clock=clock)


def test_a_ring_that_was_built_after_its_fence_is_closed() -> None:
    building, go_on, built = threading.Event(), threading.Event(), []

    def build(form: messages.Form) -> Any:
        building.set()
        assert go_on.wait(10)
        built.append(Ring(form.epoch))
        return built[0]

    model = Model()
    mine = place(model, build)

    def fence() -> None:
        assert building.wait(10)
        mine.fence(4, "rank 2 is lost")

    fencing = threading.Thread(target=fence)
    fencing.start()
    with pytest.raises(RingBrokenError, match="The ring of epoch 3 was fenced while it was built: rank 2 is lost"):
        mine.form(form(3))
    fencing.join()
    assert (mine.epoch, mine.heard_of, model.bound) == (-1, 3, [])
    go_on.set()
    for thread in threading.enumerate():
        if thread.name == "ring-build":
            thread.join(10)
    assert built[0].reason == "nobody waits for it any more"


def test_a_ring_of_an_epoch_that_is_over_is_not_built() -> None:
    mine = place(Model())
    mine.fence(4, "rank 2 is lost")
    with pytest.raises(RingBrokenError, match=r"Epoch 3 was over before its ring was built\."):
        mine.form(form(3))
    mine.form(form(4))
    assert mine.epoch == 4
    mine.unfence()
    mine.form(form(2))
    assert mine.epoch == 2


def test_a_fence_breaks_the_rings_before_it_and_no_other() -> None:
    rings: list[Ring] = []

    def build(form: messages.Form) -> Any:
        rings.append(Ring(form.epoch))
        return rings[-1]

    mine = place(Model(), build)
    mine.form(form(3))
    mine.fence(3, "it is the newest")
    assert rings[0].reason is None
    mine.fence(4, "rank 2 is lost")
    assert rings[0].reason == "rank 2 is lost"


def test_what_fails_in_building_by_a_fault_of_its_own_is_not_hidden() -> None:
    def build(form: messages.Form) -> Any:
        raise LookupError("a fault")

    with pytest.raises(LookupError, match="a fault"):
        place(Model(), build).form(form(0))


class Tether:
    def __init__(self) -> None:
        self.said: list[messages.AnyMessage] = []
        self.connected = True
        self.leaving = False
        self.formed = -1

    def join(self, join: messages.Join) -> None:
        self.said.append(join)

    def send(self, message: messages.AnyMessage) -> None:
        self.said.append(message)


def worker(model: Model, *orders: messages.AnyMessage | Severed | Left) -> tuple[Worker, Any]:
    """A worker that will get these orders, and its tether."""
    inbox: SimpleQueue[messages.AnyMessage | Severed | Left] = SimpleQueue()
    for order in orders:
        inbox.put(order)
    tether: Any = Tether()
    join = messages.Join(MEMBER, 3, "1/c", 100)
    return Worker(place=place(model), tether=tether, inbox=inbox, join=join), tether


def follow(model: Model, *orders: messages.AnyMessage | Severed) -> tuple[str | None, list[messages.AnyMessage]]:
    """What a worker returns and says that gets these orders, and then leaves."""
    mine, tether = worker(model, *orders, Left())
    return mine.run(), tether.said


def test_behind_a_step_that_broke_no_step_of_its_ring_runs() -> None:
    model = Model(1)
    steps = [messages.Step(3, number) for number in range(3)]
    ended, said = follow(model, form(3), *steps, form(4), messages.Step(4, 0), messages.Step(3, 3))
    assert ended is None
    assert model.ran == [0, 1, 0]
    assert model.bound == [3, 4]
    cost = messages.Traffic(1.0, 0.75, 0.25, 8)
    assert said[1:] == [
        messages.Formed(3, 1),
        messages.Done(3, 1, 0, cost),
        messages.Fault(3, 1, 1, "rank 2 is gone", 2),
        messages.Formed(4, 1),
        messages.Done(4, 1, 0, cost),
    ]


def test_a_rank_that_lost_rank_0_says_what_it_holds() -> None:
    _, said = follow(Model(), form(3), Severed("rank 0 was silent"))
    first, _, again = said
    assert isinstance(first, messages.Join)
    assert isinstance(again, messages.Join)
    assert (first.epoch, first.tables) == (-1, [])
    assert (again.epoch, again.tables) == (3, [messages.Table.of(5, [1, 2, 3], [[messages.Positions(0, 3)]])])


def test_a_ring_that_could_not_be_built_is_said_to_be_broken() -> None:
    def build(form: messages.Form) -> Any:
        raise RingBrokenError("rank 2 did not come", peers=(2,))

    inbox: SimpleQueue[messages.AnyMessage | Severed | Left] = SimpleQueue()
    inbox.put(form(3))
    inbox.put(messages.Refused("Go away."))
    tether: Any = Tether()
    mine = Worker(place=place(Model(), build), tether=tether, inbox=inbox, join=messages.Join(MEMBER, 3, "1/c", 100))
    assert mine.run() == "Go away."
    assert tether.said[1:] == [messages.Fault(3, 1, BUILT, "rank 2 did not come", 2)]


def test_a_worker_has_to_show_what_it_holds_and_what_its_steps_cost() -> None:
    mine, _ = worker(Model(2), form(3), *(messages.Step(3, number) for number in range(3)), Left())
    assert mine.account == WorkerAccount()
    mine.run()
    assert mine.account == WorkerAccount(epoch=3, kv_tokens=7, traffic=RankTraffic(2, 2.0, 1.5, 0.5, 16))


class Slow(Model):
    """Runs a step for as long as its test says."""

    def __init__(self, passes: Callable[[Ring], None], *broken: int) -> None:
        super().__init__(*broken)
        self._passes = passes
        self._ring: Ring | None = None

    def bind(self, ring: Any, layouts: Mapping[int, Layout] | None = None) -> None:
        super().bind(ring, layouts)
        self._ring = ring

    def run(self, step: messages.Step) -> StepResult:
        assert self._ring is not None
        self._passes(self._ring)
        return super().run(step)


@pytest.mark.parametrize("broken", [(), (0,)], ids=["done", "broken"])
def test_a_worker_whose_step_does_not_end_says_so(broken: tuple[int, ...]) -> None:
    now = 100.0
    said: list[str | None] = []

    def passes(ring: Ring) -> None:
        nonlocal now
        for seconds in (0.0, PATIENT_SECONDS, 1.0):
            now += seconds
            said.append(mine.hung())

    inbox: SimpleQueue[messages.AnyMessage | Severed | Left] = SimpleQueue()
    for order in (form(3), messages.Step(3, 0), Left()):
        inbox.put(order)
    tether: Any = Tether()
    where = place(Slow(passes, *broken), clock=lambda: now)
    mine = Worker(place=where, tether=tether, inbox=inbox, join=messages.Join(MEMBER, 3, "1/c", 100))
    assert mine.hung() is None
    mine.run()
    hangs = "A step of this rank, without its waits for others, has taken 601 s, longer than 600 s: it hangs."
    assert said == [None, None, hangs]
    assert mine.hung() is None


def test_what_a_step_waits_for_others_is_no_hang() -> None:
    """However long: a slow network makes many waits, and each has its own limit."""
    now = 100.0
    said: list[str | None] = []

    def passes(ring: Ring) -> None:
        nonlocal now
        for seconds, waited in ((1.0, 0.0), (3 * PATIENT_SECONDS, 3 * PATIENT_SECONDS), (PATIENT_SECONDS, 0.0)):
            now += seconds
            ring.seconds += waited
            said.append(mine.hung())

    mine = place(Slow(passes), clock=lambda: now)
    mine.form(form(3))
    said.append(mine.hung())
    mine.run(messages.Step(3, 0))
    now += 10 * PATIENT_SECONDS
    hangs = "A step of this rank, without its waits for others, has taken 601 s, longer than 600 s: it hangs."
    assert said == [None, None, None, hangs]
    assert mine.hung() is None, "between two steps it waits for orders"
    said.clear()
    mine.run(messages.Step(3, 1))
    assert said == [None, None, hangs], "each step is counted by itself, and by its own waits"


def test_a_rank_that_does_not_get_into_a_ring_says_so() -> None:
    """It may wait for the store and for the others, each as long as the limit of forming is; what it does itself comes on top."""
    now = 100.0
    said: list[str | None] = []

    def build(form: messages.Form) -> Any:
        nonlocal now
        for seconds in (40.0, PATIENT_SECONDS, 1.0):
            now += seconds
            said.append(mine.hung())
        return Ring(form.epoch)

    mine = place(Model(), build, clock=lambda: now)
    mine.form(form(3))
    hangs = "The way of this rank into a ring has taken 641 s, longer than 640 s: it hangs."
    assert said == [None, None, hangs]
    assert mine.hung() is None


def test_what_a_form_gives_is_what_a_worker_holds_before_the_first_step() -> None:
    mine, _ = worker(Model(), form(3), Left())
    mine.run()
    assert mine.account == WorkerAccount(epoch=3, kv_tokens=3)


def test_a_worker_says_why_it_is_in_no_ring_that_works() -> None:
    mine, tether = worker(Model())
    assert mine.outside() == "Rank 0 has formed no ring with this rank."
    tether.connected = False
    assert mine.outside() == "Rank 0 does not answer; this rank keeps its KV and goes on trying."
    tether.connected = True
    mine._place.form(form(3))
    assert mine.outside() == "The ring of epoch 3 does not work yet: not all of its ranks are inside."
    tether.formed = 3
    assert mine.outside() is None
    tether.leaving = True
    assert mine.outside() == "This rank is told to end, and leaves its ring."
