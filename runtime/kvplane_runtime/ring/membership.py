"""Who is in the ring: epochs as a state machine at rank 0. Pure: events in, actions out, the time is an argument.

::

    GATHERING --enough--> FORMING --all are inside--> FORMED
        ^                  ^   |                        |
        |       all stopped|   v                        |
        +--too few------- FENCING <---------------------+
                             a member is lost, an exchange broke, or somebody new is ready

What holds at any time:

- Every ring has an epoch of its own, and is formed only after each of its members has left the ring before it. So no two
  formed rings share an epoch, and a process is never in two.
- A ring has rank 0 and at least N-1 of N members; a side with fewer only gathers.
- A lost member is fenced out at once and the living go on without it. It is welcome again, as the same process (which
  keeps its KV) or as a new one, at the next epoch. Suspicion is not death.
- Members are processes, not ordinals. A second process of an ordinal waits until the first is lost; a process whose place
  was taken is refused for good.
- A process that says that it leaves takes part until the step under way is done, and is lost then.
- A process that beats and cannot take part (it never stops, never connects to its neighbours, or its exchanges break again
  and again) is left out for a time that doubles, so that the others can work.

A process that joins a running ring waits for the step under way, as one that leaves it does; only a fault cuts a step
short. What the members hold and what has to be computed again is :mod:`recovery`; sockets are :mod:`control`.
"""

import enum
from dataclasses import dataclass
from typing import Final

SELF: Final = 0
"""The link of rank 0 to itself."""
_MOST_EXCLUSION: Final = 600.0
_STRIKES: Final = 3
_STRIKE_SECONDS: Final = 60.0
"""So many breaks in this time, with nobody lost between them, are one member's fault."""
_TOLD_TO_END: Final = "it was told to end"
BUILT: Final = -1
"""The number of the "step" that is the building of a ring; steps count from 0."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long to wait for what, in seconds."""

    heartbeat: float = 1.0
    """Silence after which a process is suspected: five heartbeats of 0.2 s."""
    stop: float = 10.0
    """A member that still beats must have stopped by then: a thread inside a kernel hears of a fence only after it."""
    form: float = 30.0
    """A member must have connected to its neighbours by then."""
    gather: float = 10.0
    """How long a first ring of N-1 waits for the last one. A ring that was formed before never waits."""
    exclude: float = 30.0
    """How long a process that beats and cannot take part is left out at first; each time again twice as long."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What must be equal on all ranks for their logits to be those of one model."""

    world_size: int
    version: str
    config_hash: str
    """Of the model's configuration and weights, and of the settings that change a result."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A process that asks to be a member."""

    ordinal: int
    pod: str
    """Its pod's UID, or any name of its own outside Kubernetes: for messages to people."""
    process: str
    """New with every start, so that a restarted container is not taken for the process before it."""
    identity: Identity
    epoch: int = -1
    """The last epoch it heard of; -1: none."""


@dataclass(frozen=True, slots=True)
class Fence:
    """The members of the ring leave it: at once after a fault, else when the step under way is done."""

    epoch: int
    """Of the next ring: whatever carries an older one is void after an ``abort``."""
    reason: str
    abort: bool
    lost: bool = False
    """A member was lost, or an exchange broke; else somebody comes of its own accord."""


@dataclass(frozen=True, slots=True)
class Form:
    """The members build the ring of this epoch; a member's rank is its place in ``links``."""

    epoch: int
    links: tuple[int, ...]
    ordinals: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Formed:
    """Every member is inside: work may go on."""

    epoch: int
    ordinals: tuple[int, ...]
    seconds: float
    """From the fence, or from the start of rank 0, until now."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """The process behind the link can never be a member; it is told why and its link is closed."""

    link: int
    reason: str


@dataclass(frozen=True, slots=True)
class Lost:
    """A process is no longer counted, or no longer waits to be; its link, if it is still open, is closed."""

    link: int
    ordinal: int
    reason: str


Action = Fence | Form | Formed | Refuse | Lost


class Phase(enum.Enum):
    """Where the ring stands."""

    GATHERING = enum.auto()
    FENCING = enum.auto()
    FORMING = enum.auto()
    FORMED = enum.auto()


@dataclass(slots=True)
class _Member:
    candidate: Candidate
    link: int
    heard: float
    bound: bool = False
    """It was told to build the current ring, or to leave it; else it is in none."""
    answered: int = BUILT - 1
    """The last step of the current ring that it finished or gave up."""
    leaves: bool = False
    """It is told to end, and is to be in no other ring."""


class Membership:
    """The members of one ring. Each event returns what is to be done, in order.

    Rank 0 is a member too, with the link ``SELF``. It alone says itself when it has stopped (:meth:`stopped`): it is the
    one that may be about to send a step.
    """

    def __init__(self, *, leader: Candidate, limits: Limits, now: float) -> None:
        self._identity = leader.identity
        self._limits = limits
        self._members: dict[int, _Member] = {SELF: _Member(leader, SELF, heard=now)}
        self._door: dict[int, _Member] = {}
        """Who waits, by link: second processes of an ordinal, and the excluded."""
        self._excluded: dict[str, tuple[float, float]] = {}
        """By process, until when it is left out, and how long the last exclusion was."""
        self._strikes: list[float] = []
        self._counted: dict[int, Candidate] = {leader.ordinal: leader}
        """Who was counted last for each ordinal."""
        self._replaced: set[str] = set()
        """Processes whose place another one took, and the UIDs of pods whose place another pod took."""
        self._sent = BUILT
        """The last step that was sent in the current ring."""
        self._self_stopped = True
        self._aborted = False
        """The fence under way cuts the step short."""
        self._ticked = self._began = self._phase_since = now
        self._enough_since: float | None = None
        self._formed_before = False
        self.phase = Phase.GATHERING
        self.ring = -1
        """Epoch of the last ring that members were told to build; -1: none yet."""
        self.epoch = leader.epoch
        """The last epoch given: the ring's, or while fencing that of the next one."""

    # What others read.

    @property
    def size(self) -> int:
        """N: the ranks of a whole ring."""
        return self._identity.world_size

    @property
    def quorum(self) -> int:
        """Fewest members of a ring, rank 0 included."""
        return max(1, self.size - 1)

    @property
    def ordinals(self) -> tuple[int, ...]:
        """Of the processes that are counted, in a ring or not."""
        return tuple(member.candidate.ordinal for member in self._ordered())

    def candidate(self, link: int) -> Candidate | None:
        """The process behind a link; None where it is not counted."""
        member = self._members.get(link)
        return member.candidate if member else None

    # Events.

    def joined(self, link: int, candidate: Candidate, now: float) -> list[Action]:
        """A process that has loaded its weights and is in no ring asks to be a member."""
        if reason := self._against(candidate):
            return [Refuse(link, f"Rank {candidate.ordinal} (pod {candidate.pod}) {reason}")]
        self._door = {at: other for at, other in self._door.items() if other.candidate.process != candidate.process}
        self._door[link] = _Member(candidate, link, heard=now)
        before = self._at(candidate.ordinal)
        actions: list[Action] = []
        if before is not None and before.candidate.process == candidate.process:
            # The same process over a new link: the old link is dead, whatever TCP says of it.
            actions = self._remove(before, "it came back over a new connection", now)
        return actions + self._advance(now)

    def heard(self, link: int, now: float) -> None:
        """Anything came over a link."""
        if member := self._members.get(link) or self._door.get(link):
            member.heard = now

    def disconnected(self, link: int, now: float, reason: str = "its connection closed") -> list[Action]:
        """A link broke."""
        self._door.pop(link, None)
        member = self._members.get(link)
        return self._remove(member, reason, now) + self._advance(now) if member else []

    def leaves(self, link: int, now: float) -> list[Action]:
        """A process is told to end."""
        if waiting := self._door.pop(link, None):
            return [Lost(link, waiting.candidate.ordinal, _TOLD_TO_END)]
        member = self._members.get(link)
        if member is None:
            return []
        member.leaves = True
        reason = f"rank {member.candidate.ordinal} leaves"
        return self._fence(reason, now, abort=self.phase is Phase.FORMING) + self._advance(now)

    def send(self, epoch: int, number: int) -> bool:
        """Whether rank 0 may send a step to all members now; it is counted as sent. A step of a ring that is over may not."""
        ring_lives = self.phase is Phase.FORMED or (self.phase is Phase.FENCING and not self._aborted)
        if epoch != self.ring or not ring_lives:
            return False
        self._sent = number
        return True

    def done(self, link: int, epoch: int, number: int, now: float) -> list[Action]:
        """A member finished a step, or (``BUILT``) is inside the ring of ``epoch``."""
        member = self._members.get(link)
        if not member or not member.bound or epoch != self.ring:
            return []
        member.answered = number
        return self._advance(now)

    def broken(
        self, link: int, epoch: int, number: int, reason: str, now: float, *, suspect: int | None = None
    ) -> list[Action]:
        """A member gave up a step and left the ring of ``epoch``, which is no longer whole, whoever is to blame.

        ``suspect`` is the rank that it waited for, where it knows.
        """
        member = self._members.get(link)
        if not member or not member.bound or epoch != self.ring:
            return []
        member.answered = max(number, self._sent)  # it runs none of the steps behind the one that broke
        in_vain = self.phase is Phase.FORMING and now - self._phase_since >= self._limits.form
        actions = self._fence(f"rank {member.candidate.ordinal}: {reason}", now, abort=True, lost=True)
        if actions:  # it is the first to say so
            actions += self._absent(link, suspect, now) if in_vain else self._strike(link, suspect, now)
        return actions + self._advance(now)

    def withdrawn(self, now: float) -> list[Action]:
        """The members were never told of the ring that was to be built: it was fenced before."""
        for member in self._members.values():
            member.answered = BUILT
        return self._advance(now)

    def stopped(self, epoch: int, now: float) -> list[Action]:
        """Rank 0 itself has stopped, as the fence of ``epoch`` asked, and sends no more steps."""
        if self.phase is not Phase.FENCING or epoch != self.epoch:
            return []
        self._self_stopped = True
        return self._advance(now)

    def tick(self, now: float) -> list[Action]:
        """Time passed. To be called several times in a heartbeat limit."""
        pause = now - self._ticked
        self._ticked = now
        if pause > self._limits.heartbeat / 2:
            # This process stood still, and the others' heartbeats wait in its sockets: only what follows is their silence.
            for member in (*self._members.values(), *self._door.values()):
                member.heard += pause
            self._phase_since += pause
        actions: list[Action] = []
        for waiting in list(self._door.values()):  # else a ring would be formed for the dead
            if reason := self._silent(waiting, now):
                del self._door[waiting.link]
                actions.append(Lost(waiting.link, waiting.candidate.ordinal, reason))
        for member in reversed(self._ordered()):
            if reason := self._silent(member, now):
                actions += self._remove(member, reason, now)
            elif reason := self._overdue(member, now):
                self._exclude(member, now)
                actions += self._remove(member, reason, now)
        return actions + self._advance(now)

    # The machine.

    def _against(self, candidate: Candidate) -> str | None:
        """The first reason against a candidate, in the order in which a person would look for it."""
        mine, its = self._identity, candidate.identity
        if its.version != mine.version:
            return f"runs version {its.version}, rank 0 runs {mine.version}; give all ranks the same image."
        if its.world_size != mine.world_size:
            return f"has WORLD_SIZE={its.world_size}, rank 0 has {mine.world_size}; start all with the same WORLD_SIZE."
        if not 1 <= candidate.ordinal < self.size:
            return f"is no rank of a ring of {self.size}: its workers are 1 to {self.size - 1}."
        if its.config_hash != mine.config_hash:
            return (
                f"has the configuration {its.config_hash}, rank 0 has {mine.config_hash}; "
                "give all ranks the same model, dtype and KVPLANE_RING_* settings."
            )
        return self._out_of_date(candidate)

    def _out_of_date(self, candidate: Candidate) -> str | None:
        """Why its time is over: another process or pod has its place."""
        if candidate.process in self._replaced:
            return "was away, and another process has taken its place; it must end."
        member = self._at(candidate.ordinal)
        if candidate.pod in self._replaced and member is not None and member.candidate.pod != candidate.pod:
            # Its node was cut off, and its kubelet, which does not know yet, has started the container again.
            return f"was deleted, and pod {member.candidate.pod} has taken its place; it must end."
        return None

    def _silent(self, member: _Member, now: float) -> str | None:
        silence = now - member.heard
        if member.link == SELF or silence <= self._limits.heartbeat:
            return None
        return f"it was silent for {silence:.2f} s, more than the limit of {self._limits.heartbeat:g} s"

    def _overdue(self, member: _Member, now: float) -> str | None:
        if member.link == SELF:
            return None
        waited = now - self._phase_since
        if self.phase is Phase.FENCING and self._aborted and not self._stopped(member) and waited > self._limits.stop:
            return f"it did not stop within {self._limits.stop:g} s"
        # A member that waited in vain gives up after the first limit, and says for whom: that is worth waiting for.
        limit = self._limits.form + self._limits.stop
        if self.phase is Phase.FORMING and member.answered < BUILT and waited > limit:
            return f"it did not connect to its neighbours within {limit:g} s"
        return None

    def _suspected(self, suspect: int | None) -> _Member | None:
        ring = [member for member in self._ordered() if member.bound]
        return ring[suspect] if suspect is not None and suspect < len(ring) else None

    def _absent(self, link: int, suspect: int | None, now: float) -> list[Action]:
        """Leaves out who keeps a ring from being built: who did not come, or else one of those that cannot connect."""
        blamed = self._suspected(suspect)
        if blamed is None:  # all have come; who says so is one of those that are not inside
            outside = [member for member in self._ordered() if member.link != SELF and member.answered < BUILT]
            blamed = outside[-1] if link == SELF and outside else self._members[link]
        if blamed.link == SELF:
            return []
        self._exclude(blamed, now)
        return self._remove(blamed, f"the ring of epoch {self.ring} could not be built with it", now)

    def _strike(self, link: int, suspect: int | None, now: float) -> list[Action]:
        """Leaves out who is to blame for the breaks of the last minute, if they were too many."""
        self._strikes = [at for at in self._strikes if now - at < _STRIKE_SECONDS] + [now]
        if len(self._strikes) < _STRIKES:
            return []
        blamed = self._suspected(suspect) or self._members[link]
        if blamed.link == SELF:
            blamed = self._members[link]
        if blamed.link == SELF:
            return []
        self._exclude(blamed, now)
        return self._remove(blamed, f"exchanges with it broke {_STRIKES} times in a minute", now)

    def _exclude(self, member: _Member, now: float) -> None:
        process = member.candidate.process
        _, last = self._excluded.get(process, (now, self._limits.exclude / 2))
        seconds = min(2 * last, _MOST_EXCLUSION)
        self._excluded[process] = now + seconds, seconds

    def _admit(self, now: float) -> list[Action]:
        """Lets in who waits for a place that is free now."""
        actions: list[Action] = []
        for link, waiting in list(self._door.items()):
            until, _ = self._excluded.get(waiting.candidate.process, (now, 0.0))
            if self._at(waiting.candidate.ordinal) is None and now >= until:
                del self._door[link]
                actions += self._welcome(waiting, now)
        return actions

    def _welcome(self, member: _Member, now: float) -> list[Action]:
        """Counts a process; a ring that runs stops for it at the next step."""
        candidate = member.candidate
        last = self._counted.get(candidate.ordinal, candidate)
        if last.process != candidate.process:
            self._replaced.add(last.process)
        if last.pod != candidate.pod:
            self._replaced.add(last.pod)
        self._counted[candidate.ordinal] = candidate
        self._members[member.link] = member
        return self._fence(f"rank {candidate.ordinal} is ready to join", now, abort=self.phase is Phase.FORMING)

    def _remove(self, member: _Member, reason: str, now: float) -> list[Action]:
        del self._members[member.link]
        ordinal = member.candidate.ordinal
        actions: list[Action] = [Lost(member.link, ordinal, reason)]
        self._strikes.clear()
        if member.bound:
            actions += self._fence(f"rank {ordinal} is lost: {reason}", now, abort=True, lost=True)
        return actions

    def _fence(self, reason: str, now: float, *, abort: bool, lost: bool = False) -> list[Action]:
        if self.phase is Phase.GATHERING or (self.phase is Phase.FENCING and (self._aborted or not abort)):
            return []
        if self.phase is Phase.FORMED:
            self._began = now
        if self.phase is not Phase.FENCING:
            self.epoch += 1
            self.phase = Phase.FENCING
        self._aborted = abort
        self._phase_since = now
        return [Fence(self.epoch, reason, abort, lost)]

    def _stopped(self, member: _Member) -> bool:
        return self._self_stopped if member.link == SELF else not member.bound or member.answered >= self._sent

    def _advance(self, now: float) -> list[Action]:
        """The steps from one phase to the next that need no event of their own."""
        actions = self._admit(now)
        members = self._ordered()
        if self.phase is Phase.FORMING and all(member.answered >= BUILT for member in members):
            self.phase = Phase.FORMED
            self._formed_before = True
            return [*actions, Formed(self.epoch, self.ordinals, seconds=now - self._began)]
        if self.phase is Phase.FENCING and all(map(self._stopped, members)):
            self.phase = Phase.GATHERING
        if self.phase is Phase.GATHERING:
            for member in members:
                if member.leaves:
                    actions += self._remove(member, _TOLD_TO_END, now)
            members = self._ordered()
        if self.phase is not Phase.GATHERING or len(members) < self.quorum:
            self._enough_since = None
            return actions
        if self._enough_since is None:
            self._enough_since = now
        if len(members) < self.size and not self._formed_before and now - self._enough_since < self._limits.gather:
            return actions
        return actions + self._form(members, now)

    def _form(self, members: list[_Member], now: float) -> list[Action]:
        # Later than any epoch that a member has heard of: it may come from the ring of another rank 0.
        heard_of = max(self.ring, *(member.candidate.epoch for member in members))
        self.epoch = max(self.epoch, heard_of + 1)
        self.ring = self.epoch
        self.phase = Phase.FORMING
        self._phase_since = now
        self._sent = BUILT
        self._self_stopped = False
        for member in members:
            member.bound, member.answered = True, BUILT - 1
        return [Form(self.epoch, tuple(member.link for member in members), self.ordinals)]

    def _at(self, ordinal: int) -> _Member | None:
        return next((member for member in self._members.values() if member.candidate.ordinal == ordinal), None)

    def _ordered(self) -> list[_Member]:
        return sorted(self._members.values(), key=lambda member: member.candidate.ordinal)
