"""Membership: each way in and out of a ring, and random orders of events against a world of simulated processes."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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

LIMITS = Limits(heartbeat=1.0, stop=10.0, form=30.0, gather=10.0, exclude=5.0)
IDENTITY = Identity(world_size=4, version="1.0", config_hash="c")


def candidate(ordinal: int, process: str = "", *, pod: str = "", epoch: int = -1, **identity: Any) -> Candidate:
    changed = Identity(**{"world_size": 4, "version": "1.0", "config_hash": "c", **identity})
    return Candidate(ordinal, pod or f"pod-{ordinal}", process or f"p{ordinal}", changed, epoch)


def leader(size: int = 4, *, epoch: int = -1) -> Membership:
    return Membership(leader=candidate(0, epoch=epoch, world_size=size), limits=LIMITS, now=0.0)


def formed(size: int = 4) -> Membership:
    """A whole ring of epoch 0 at time 0; the link of each worker is its ordinal."""
    ring = leader(size)
    for ordinal in range(1, size):
        ring.joined(ordinal, candidate(ordinal, world_size=size), 0.0)
    for link in range(size):
        ring.done(link, 0, BUILT, 0.0)
    assert ring.phase is Phase.FORMED
    return ring


def only(actions: list[Action], kind: type) -> Any:
    (found,) = [action for action in actions if isinstance(action, kind)]
    return found


def test_a_ring_forms_when_all_are_there_and_works_when_all_are_inside() -> None:
    ring = leader()
    assert ring.joined(7, candidate(2), 0.0) == []
    assert ring.joined(8, candidate(1), 0.0) == []
    assert ring.joined(9, candidate(3), 0.0) == [Form(0, (SELF, 8, 7, 9), (0, 1, 2, 3))]
    for link in (SELF, 7, 8):
        assert ring.done(link, 0, BUILT, 0.5) == []
    assert ring.done(9, 0, BUILT, 0.5) == [Formed(0, (0, 1, 2, 3), seconds=0.5)]


def test_a_rank_that_never_comes_is_waited_for_once_and_then_done_without() -> None:
    ring = leader()
    ring.joined(1, candidate(1), 0.0)
    ring.joined(2, candidate(2), 5.0)
    for tenth in range(51, 150):
        ring.heard(1, tenth / 10)
        ring.heard(2, tenth / 10)
        assert ring.tick(tenth / 10) == []
    ring.heard(1, 15.0)
    ring.heard(2, 15.0)
    assert only(ring.tick(15.1), Form).ordinals == (0, 1, 2)


def test_fewer_than_all_but_one_never_form() -> None:
    ring = leader()
    ring.joined(1, candidate(1), 0.0)
    for tenth in range(1000):
        ring.heard(1, tenth / 10)
        assert ring.tick(tenth / 10) == []


def test_a_lost_member_is_fenced_out_at_once_and_the_living_form_as_soon_as_they_have_stopped() -> None:
    ring = formed()
    assert ring.send(0, 0)
    ring.done(1, 0, 0, 1.0)  # one had finished the step, rank 3 hangs in it
    actions = ring.disconnected(2, 1.0)
    assert only(actions, Lost).ordinal == 2
    assert only(actions, Fence) == Fence(1, "rank 2 is lost: its connection closed", abort=True, lost=True)
    assert not ring.send(0, 1)
    assert ring.stopped(1, 1.01) == []
    assert ring.broken(3, 0, 0, "it was fenced", 1.02) == [Form(1, (0, 1, 3), (0, 1, 3))]


def test_silence_is_a_loss_after_the_limit_only() -> None:
    ring = formed()
    for tenth in range(1, 11):
        for link in (1, 3):
            ring.heard(link, tenth / 10)
        assert ring.tick(tenth / 10) == []
    ring.heard(1, 1.05)
    ring.heard(3, 1.05)
    assert only(ring.tick(1.05), Lost).ordinal == 2


def test_a_pause_of_rank_0_itself_is_nobodys_silence() -> None:
    ring = formed()
    ring.tick(0.1)
    assert ring.tick(60.0) == []
    assert only(ring.tick(60.4) + ring.tick(60.8) + ring.tick(61.05), Fence).abort


def test_a_broken_exchange_forms_anew_with_all_who_answer() -> None:
    ring = formed()
    ring.send(0, 0)
    actions = ring.broken(1, 0, 0, "rank 2 did not answer", 1.0)
    assert only(actions, Fence).reason == "rank 1: rank 2 did not answer"
    ring.stopped(1, 1.0)
    ring.done(3, 0, 0, 1.0)
    assert only(ring.broken(2, 0, 0, "fenced", 1.1), Form).ordinals == (0, 1, 2, 3)


def test_who_broke_a_step_is_not_waited_for_in_the_steps_behind_it() -> None:
    ring = formed()
    ring.send(0, 0)
    ring.send(0, 1)
    ring.broken(1, 0, 0, "rank 2 did not answer", 1.0)
    ring.stopped(1, 1.0)
    assert ring.done(3, 0, 0, 1.0) == []
    assert ring.broken(2, 0, 0, "fenced", 1.1) == []
    assert only(ring.done(3, 0, 1, 1.2), Form).ordinals == (0, 1, 2, 3)


def test_reports_of_an_older_epoch_change_nothing() -> None:
    ring = formed()
    ring.disconnected(2, 1.0)
    ring.stopped(1, 1.0)
    assert ring.phase is Phase.FORMING
    assert ring.broken(1, 0, 0, "late", 1.0) == []
    assert ring.done(1, 0, BUILT, 1.0) == []
    assert ring.phase is Phase.FORMING


def test_a_new_process_joins_after_the_step_under_way() -> None:
    ring = formed()
    ring.disconnected(2, 1.0)
    ring.stopped(1, 1.0)
    for link in (SELF, 1, 3):
        ring.done(link, 1, BUILT, 1.0)
    ring.send(1, 0)
    assert ring.joined(9, candidate(2, "new"), 2.0) == [Fence(2, "rank 2 is ready to join", abort=False)]
    assert ring.send(1, 1), "until rank 0 has stopped it may still send"
    for link in (1, 3):
        ring.done(link, 1, 1, 2.1)
    assert ring.stopped(2, 2.2) == [Form(2, (0, 1, 9, 3), (0, 1, 2, 3))]


def test_a_loss_during_a_join_cuts_the_step_short() -> None:
    ring = formed(4)
    ring.disconnected(2, 1.0)
    ring.stopped(1, 1.0)
    for link in (SELF, 1, 3):
        ring.done(link, 1, BUILT, 1.0)
    ring.send(1, 0)
    ring.joined(9, candidate(2, "new"), 2.0)
    assert only(ring.disconnected(3, 2.1), Fence) == Fence(
        2, "rank 3 is lost: its connection closed", abort=True, lost=True
    )
    ring.broken(1, 1, 0, "fenced", 2.2)
    assert only(ring.stopped(2, 2.2), Form).ordinals == (0, 1, 2)


def test_a_member_that_leaves_takes_part_until_the_step_under_way_is_done() -> None:
    ring = formed()
    ring.send(0, 0)
    assert ring.leaves(2, 1.0) == [Fence(1, "rank 2 leaves", abort=False)]
    assert ring.send(0, 1), "until rank 0 has stopped it may still send"
    assert ring.stopped(1, 1.1) == []
    for link in (SELF, 1, 3):
        assert ring.done(link, 0, 1, 1.2) == []
    assert ring.done(2, 0, 1, 1.3) == [Lost(2, 2, "it was told to end"), Form(1, (0, 1, 3), (0, 1, 3))]
    assert ring.disconnected(2, 1.4) == []


def test_a_member_that_leaves_and_dies_is_a_loss() -> None:
    ring = formed()
    ring.send(0, 0)
    ring.leaves(2, 1.0)
    assert only(ring.disconnected(2, 1.1), Fence).abort
    for link in (1, 3):
        ring.broken(link, 0, 0, "fenced", 1.2)
    assert only(ring.stopped(1, 1.2), Form).ordinals == (0, 1, 3)


def test_a_member_that_leaves_is_let_go_though_the_ring_ends_with_it() -> None:
    ring = formed()
    ring.disconnected(3, 1.0)
    ring.stopped(1, 1.0)
    for link in (SELF, 1, 2):
        ring.done(link, 1, BUILT, 1.0)
    ring.leaves(2, 2.0)
    assert ring.stopped(2, 2.0) == [Lost(2, 2, "it was told to end")]
    assert ring.phase is Phase.GATHERING
    assert ring.joined(9, candidate(2, "new"), 9.0) == [Form(2, (0, 1, 9), (0, 1, 2))]


def test_who_leaves_while_a_ring_is_built_is_in_none() -> None:
    ring = leader()
    for ordinal in (1, 2, 3):
        ring.joined(ordinal, candidate(ordinal), 0.0)
    assert only(ring.leaves(3, 0.1), Fence).abort
    for link in (1, 2, 3):
        ring.broken(link, 0, BUILT, "fenced", 0.2)
    assert ring.stopped(1, 0.2) == [Lost(3, 3, "it was told to end")]
    assert ring.joined(9, candidate(3, "new"), 0.3) == [Form(1, (0, 1, 2, 9), (0, 1, 2, 3))]


def test_who_waits_for_a_place_or_for_others_leaves_at_once() -> None:
    ring = formed()
    ring.joined(9, candidate(2, "new"), 1.0)
    assert ring.leaves(9, 2.0) == [Lost(9, 2, "it was told to end")]
    assert ring.phase is Phase.FORMED
    alone = leader()
    alone.joined(5, candidate(1), 0.0)
    assert alone.leaves(5, 1.0) == [Lost(5, 1, "it was told to end")]
    assert alone.leaves(5, 1.0) == []


def test_the_same_process_over_a_new_connection_is_the_same_member() -> None:
    ring = formed()
    actions = ring.joined(9, candidate(2, epoch=0), 1.0)
    assert only(actions, Lost).link == 2
    assert only(ring.stopped(1, 1.0), Form) == Form(1, (0, 1, 9, 3), (0, 1, 2, 3))


def test_a_second_process_waits_for_the_first_and_then_takes_its_place_for_good() -> None:
    ring = formed()
    assert ring.joined(9, candidate(2, "new"), 1.0) == []
    assert ring.joined(10, candidate(2, "new"), 1.1) == [], "it came over a newer connection"
    ring.disconnected(2, 2.0)
    assert only(ring.stopped(1, 2.0), Form).links == (0, 1, 10, 3)
    refusal = only(ring.joined(11, candidate(2), 3.0), Refuse)
    assert refusal.reason == ("Rank 2 (pod pod-2) was away, and another process has taken its place; it must end.")


def test_a_process_of_a_pod_that_another_pod_replaced_is_sent_away_while_that_one_is_there() -> None:
    """A node was cut off and is back: its kubelet starts the container again until it hears that the pod is gone."""
    ring = formed()
    ring.disconnected(2, 1.0)
    assert only(ring.stopped(1, 1.0), Form).ordinals == (0, 1, 3)
    ring.joined(9, candidate(2, "new", pod="made-anew"), 2.0)
    for link in (1, 3):
        ring.done(link, 1, BUILT, 2.0)
    refusal = only(ring.joined(10, candidate(2, "restarted"), 3.0), Refuse)
    assert refusal.reason == "Rank 2 (pod pod-2) was deleted, and pod made-anew has taken its place; it must end."
    assert ring.joined(11, candidate(2, "again", pod="made-anew"), 3.5) == [], (
        "a second process of the pod that is there"
    )
    ring.disconnected(11, 4.0)
    ring.disconnected(9, 4.0)
    assert ring.joined(12, candidate(2, "restarted"), 5.0) == [], "better than nobody"


def test_who_falls_silent_while_it_waits_is_let_go_and_no_ring_is_formed_for_it() -> None:
    ring = formed()
    ring.joined(9, candidate(2, "new"), 0.0)
    actions: list[Action] = []
    for tenth in range(1, 21):
        for link in (1, 2, 3):
            ring.heard(link, tenth / 10)
        actions += ring.tick(tenth / 10)
    assert actions == [Lost(9, 2, "it was silent for 1.10 s, more than the limit of 1 s")]
    ring.disconnected(2, 2.0)
    assert only(ring.stopped(1, 2.0), Form).ordinals == (0, 1, 3)


def test_two_losses_leave_too_few_until_one_is_back() -> None:
    ring = formed()
    ring.disconnected(2, 1.0)
    ring.disconnected(3, 1.0)
    assert ring.stopped(1, 1.0) == []
    assert ring.phase is Phase.GATHERING
    assert ring.joined(9, candidate(3, "new"), 9.0) == [Form(1, (0, 1, 9), (0, 1, 3))]


def test_a_loss_while_forming_forms_again() -> None:
    ring = formed()
    ring.disconnected(2, 1.0)
    ring.stopped(1, 1.0)
    ring.done(1, 1, BUILT, 1.0)
    joined = ring.joined(9, candidate(2, "new"), 1.0)
    assert joined == [Fence(2, "rank 2 is ready to join", abort=True, lost=False)]
    ring.stopped(2, 1.1)
    assert only(ring.broken(3, 1, BUILT, "fenced", 1.2), Form) == Form(2, (0, 1, 9, 3), (0, 1, 2, 3))


def test_a_ring_whose_forms_were_never_sent_is_over_at_once() -> None:
    ring = formed()
    ring.disconnected(2, 1.0)
    ring.stopped(1, 1.0)
    ring.joined(9, candidate(2, "new"), 1.0)
    assert ring.withdrawn(1.0) == []
    assert only(ring.stopped(2, 1.1), Form).epoch == 2


@pytest.mark.parametrize(("phase", "limit"), [("stop", 10.0), ("form", 40.0)])
def test_a_member_that_beats_and_does_nothing_is_lost_in_the_end(phase: str, limit: float) -> None:
    ring = formed()
    ring.send(0, 0)
    ring.disconnected(2, 0.0)
    ring.stopped(1, 0.0)
    if phase == "form":
        ring.broken(1, 0, 0, "fenced", 0.0)
        ring.broken(3, 0, 0, "fenced", 0.0)
        ring.done(SELF, 1, BUILT, 0.0)
        ring.done(1, 1, BUILT, 0.0)
    else:
        ring.broken(1, 0, 0, "fenced", 0.0)
    for tenth in range(1, int(limit * 10) + 1):
        ring.heard(1, tenth / 10)
        ring.heard(3, tenth / 10)
        assert ring.tick(tenth / 10) == []
    assert only(ring.tick(limit + 0.1), Lost).ordinal == 3


def breaks(ring: Membership, link: int, now: float, *, suspect: int | None) -> list[Action]:
    """A break that ``link`` is the first to report; the ring forms again if all come."""
    epoch = ring.ring
    ring.send(epoch, 0)
    actions = ring.broken(link, epoch, 0, "broken", now, suspect=suspect)
    for member in (1, 2, 3):
        actions += ring.broken(member, epoch, 0, "fenced", now)
    actions += ring.stopped(ring.epoch, now)
    for member in (SELF, 1, 2, 3):
        ring.done(member, ring.ring, BUILT, now)
    return actions


@pytest.mark.parametrize(("reporter", "suspect", "blamed"), [(1, 3, 3), (1, None, 1), (2, 0, 2), (SELF, 3, 3)])
def test_a_member_whose_exchanges_break_again_and_again_is_left_out_for_a_time(
    reporter: int, suspect: int | None, blamed: int
) -> None:
    ring = formed()
    for second in (1.0, 2.0):
        assert only(breaks(ring, reporter, second, suspect=suspect), Form).ordinals == (0, 1, 2, 3)
    actions = breaks(ring, reporter, 3.0, suspect=suspect)
    assert only(actions, Lost).ordinal == blamed
    rest = tuple(ordinal for ordinal in range(4) if ordinal != blamed)
    assert only(actions, Form).ordinals == rest
    again = candidate(blamed, epoch=ring.epoch)
    assert ring.joined(9, again, 3.5) == []
    for tenth in range(31, 80):
        for link in (*rest, 9):
            ring.heard(link, tenth / 10)
        assert ring.tick(tenth / 10) == []
    assert only(ring.tick(8.0), Fence) == Fence(ring.epoch, f"rank {blamed} is ready to join", abort=False)


def test_breaks_around_a_loss_are_nobodys_fault() -> None:
    ring = formed()
    for second in (1.0, 2.0):
        breaks(ring, 1, second, suspect=3)
    ring.disconnected(2, 2.5)
    ring.stopped(ring.epoch, 2.5)
    for link in (SELF, 1, 3):
        ring.done(link, ring.ring, BUILT, 2.6)
    assert not [action for action in breaks(ring, 1, 3.0, suspect=2) if isinstance(action, Lost)]


def test_of_two_that_cannot_connect_one_is_left_out() -> None:
    ring = formed()
    ring.disconnected(1, 0.0)
    ring.joined(9, candidate(1, "new"), 0.0)
    ring.stopped(1, 0.0)
    ring.done(SELF, ring.ring, BUILT, 0.0)
    ring.done(9, ring.ring, BUILT, 0.0)
    for tenth in range(1, 401):
        for link in (9, 2, 3):
            ring.heard(link, tenth / 10)
        assert ring.tick(tenth / 10) == []
    assert [action.ordinal for action in ring.tick(40.1) if isinstance(action, Lost)] == [3]


@pytest.mark.parametrize(
    ("reporter", "suspect", "seconds", "lost"),
    [
        (3, 1, 30.0, [1]),  # it did not come, and 3 is not to blame for having waited
        (3, 1, 5.0, []),  # what broke was not that: it may only be slow
        (3, 0, 30.0, []),
        (3, None, 30.0, [3]),  # all have come: it cannot connect to somebody
        (SELF, None, 30.0, [3]),  # nor can rank 0, to one of those that are not inside
    ],
)
def test_who_keeps_a_ring_from_being_built_is_left_out(
    reporter: int, suspect: int | None, seconds: float, lost: list[int]
) -> None:
    ring = formed()
    ring.disconnected(1, 0.0)
    ring.joined(9, candidate(1, "new"), 0.0)
    ring.stopped(1, 0.0)
    ring.done(2, 1, BUILT, 1.0)
    actions = ring.broken(reporter, 1, BUILT, "it waited for the others", seconds, suspect=suspect)
    for link in (9, 2, 3):
        actions += ring.broken(link, 1, BUILT, "fenced", seconds)
    actions += ring.stopped(2, seconds)
    assert [action.ordinal for action in actions if isinstance(action, Lost)] == lost
    assert only(actions, Form).ordinals == tuple(ordinal for ordinal in range(4) if ordinal not in lost)


def test_a_new_rank_0_goes_on_behind_the_epochs_of_its_workers() -> None:
    ring = leader()
    ring.joined(1, candidate(1, epoch=6), 0.0)
    ring.joined(2, candidate(2, epoch=7), 0.0)
    assert only(ring.joined(3, candidate(3, epoch=6), 0.0), Form).epoch == 8


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (
            candidate(1, version="1.1"),
            "Rank 1 (pod pod-1) runs version 1.1, rank 0 runs 1.0; give all ranks the same image.",
        ),
        (
            candidate(1, world_size=3),
            "Rank 1 (pod pod-1) has WORLD_SIZE=3, rank 0 has 4; start all with the same WORLD_SIZE.",
        ),
        (candidate(4), "Rank 4 (pod pod-4) is no rank of a ring of 4: its workers are 1 to 3."),
        (candidate(0, "other"), "Rank 0 (pod pod-0) is no rank of a ring of 4: its workers are 1 to 3."),
        (
            candidate(1, config_hash="d"),
            "Rank 1 (pod pod-1) has the configuration d, rank 0 has c; "
            "give all ranks the same model, dtype and KVPLANE_RING_* settings.",
        ),
    ],
)
def test_what_does_not_belong_is_refused_with_a_sentence(other: Candidate, reason: str) -> None:
    assert leader().joined(5, other, 0.0) == [Refuse(5, reason)]


def test_a_ring_of_one_needs_nobody() -> None:
    ring = leader(1)
    assert only(ring.tick(0.1), Form).ordinals == (0,)


# Random orders.


@dataclass
class Process:
    """A worker (or rank 0's own model): does what it is told, in order, when it is given its turn."""

    ordinal: int
    name: str
    link: int = SELF
    alive: bool = True
    frozen: bool = False
    epoch: int = -1
    ring: int | None = None
    step: int | None = None
    """It is in the midst of it."""
    inbox: list[tuple[str, int]] = field(default_factory=list)


class World:
    def __init__(self, size: int) -> None:
        self.size = size
        self.now = 0.0
        self.ring = Membership(leader=candidate(0, world_size=size), limits=LIMITS, now=0.0)
        self.links = 0
        self.names = 0
        self.self = Process(0, "p0")
        self.workers: dict[int, Process] = {}
        self.stranded: list[Process] = []
        """Alive, but not connected to rank 0."""
        self.number = 0
        self.epochs: list[int] = []
        self.formed: set[int] = set()
        self.members: tuple[int, ...] = ()

    def start(self, ordinal: int) -> None:
        self.names += 1
        self.connect(Process(ordinal, f"q{self.names}"))

    def connect(self, process: Process) -> None:
        self.links += 1
        process.link, process.ring, process.step, process.inbox = self.links, None, None, []
        self.workers[process.link] = process
        self.act(
            self.ring.joined(
                process.link,
                candidate(process.ordinal, process.name, epoch=process.epoch, world_size=self.size),
                self.now,
            )
        )

    def cut(self, process: Process, *, dies: bool) -> None:
        del self.workers[process.link]
        process.alive = not dies
        if process.alive:
            self.stranded.append(process)
        self.act(self.ring.disconnected(process.link, self.now))

    def turn(self, process: Process) -> None:
        """Lets a process do the next thing it was told."""
        if process.frozen or not process.inbox:
            return
        kind, number = process.inbox.pop(0)
        if kind == "form":
            assert process.epoch < number, "a process sees epochs grow"
            process.ring = process.epoch = number
            process.step = BUILT
            if self.all_there() and all(other.ring == number and not other.frozen for other in self.mates()):
                self.finish(number, BUILT)
        elif kind == "step" and process.ring is not None:
            process.step = number
            if self.all_there() and all(other.step == number and not other.frozen for other in self.mates()):
                self.finish(process.ring, number)
        elif kind == "fence":
            if process.step is not None and process.ring is not None:
                step, process.step = process.step, None
                self.act(self.ring.broken(process.link, process.ring, step, "fenced", self.now))
            process.ring = None
            if process is self.self:
                self.act(self.ring.stopped(number, self.now))

    def all_there(self) -> bool:
        """Whether none of the members of the last ring is gone: else their exchanges hang."""
        return len(self.mates()) == len(self.members)

    def mates(self) -> list[Process]:
        """The members of the last ring that are still there."""
        return [other for other in (self.self, *self.workers.values()) if other.link in self.members]

    def finish(self, epoch: int, number: int) -> None:
        """The last one came: all get through."""
        for process in self.mates():
            process.step = None
            self.act(self.ring.done(process.link, epoch, number, self.now))

    def act(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Fence():
                    targets = [self.self, *self.workers.values()] if action.abort else [self.self]
                    for process in targets:
                        process.inbox.append(("fence", action.epoch))
                case Form():
                    assert not self.epochs or action.epoch > self.epochs[-1]
                    self.epochs.append(action.epoch)
                    assert action.links[0] == SELF and len(action.links) >= max(1, self.size - 1)
                    assert len(set(action.ordinals)) == len(action.ordinals)
                    self.members = action.links
                    for link in action.links:
                        process = self.process(link)
                        assert process.step is None, "it is still in a step of the ring before"
                        process.inbox.append(("form", action.epoch))
                    self.number = 0
                case Formed():
                    assert action.epoch not in self.formed
                    assert action.epoch == self.epochs[-1]
                    self.formed.add(action.epoch)
                    for link in self.members:
                        assert self.process(link).ring == action.epoch
                case Lost() | Refuse():
                    process = self.workers.pop(action.link, None)
                    if process is not None and isinstance(action, Refuse):
                        process.alive = False
                    elif process is not None:
                        process.ring = process.step = None
                        process.inbox = []
                        self.stranded.append(process)

    def process(self, link: int) -> Process:
        return self.self if link == SELF else self.workers[link]

    def wait(self, seconds: float) -> None:
        for _ in range(int(seconds * 10)):
            self.now += 0.1
            for process in list(self.workers.values()):
                if not process.frozen:
                    self.ring.heard(process.link, self.now)
            self.act(self.ring.tick(self.now))

    def send(self) -> None:
        if self.self.ring == self.ring.ring and self.self.step is None and self.ring.send(self.ring.ring, self.number):
            for link in self.members:
                if link == SELF or link in self.workers:
                    self.process(link).inbox.append(("step", self.number))
            self.number += 1


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "start",
                "kill",
                "cut",
                "leave",
                "freeze",
                "thaw",
                "back",
                "wait",
                "wait",
                "send",
                "send",
                *["turn"] * 8,
                "break",
            ]
        ),
        st.integers(0, 11),
    ),
    max_size=120,
)


@settings(max_examples=300, deadline=None)
@given(size=st.integers(1, 5), events=EVENTS)
def test_random_orders_are_safe_and_a_calm_end_forms_a_ring_of_all_who_live(  # noqa: PLR0912  (a branch for each kind of event)
    size: int, events: list[tuple[str, int]]
) -> None:
    world = World(size)
    for kind, pick in events:
        workers = list(world.workers.values())
        worker = workers[pick % len(workers)] if workers else None
        match kind:
            case "start" if size > 1:
                world.start(1 + pick % (size - 1))
            case "kill" | "cut" if worker:
                world.cut(worker, dies=kind == "kill")
            case "leave" if worker:
                world.act(world.ring.leaves(worker.link, world.now))
            case "freeze" if worker:
                worker.frozen = True
            case "thaw" if worker:
                worker.frozen = False
            case "back" if world.stranded:
                process = world.stranded.pop(pick % len(world.stranded))
                if process.alive and not process.frozen:
                    world.connect(process)
            case "wait":
                world.wait((pick + 1) / 10)
            case "send":
                world.send()
            case "turn":
                everybody = [world.self, *workers]
                world.turn(everybody[pick % len(everybody)])
            case "break" if worker and worker.ring is not None and worker.step is not None:
                ring, step, worker.ring, worker.step = worker.ring, worker.step, None, None
                world.act(world.ring.broken(worker.link, ring, step, "its exchange failed", world.now))
    # From here on nothing fails: whoever lives answers.
    for process in [*world.workers.values(), *world.stranded]:
        process.frozen = False
    settled = 0
    for _ in range(400):
        for process in list(world.stranded):
            world.stranded.remove(process)
            world.connect(process)
        for process in [world.self, *world.workers.values()]:
            while process.inbox and process.link in (SELF, *world.workers):
                world.turn(process)
        world.wait(0.5)
        there = {0, *(process.ordinal for process in world.workers.values())}
        settled = settled + 1 if world.ring.phase is Phase.FORMED and set(world.ring.ordinals) == there else 0
        if settled == 10:
            break
    if len(there) >= max(1, size - 1):
        assert world.ring.phase is Phase.FORMED
        assert set(world.ring.ordinals) == there
    else:
        assert world.ring.phase is Phase.GATHERING
