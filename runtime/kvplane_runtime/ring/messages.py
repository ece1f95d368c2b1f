"""What ranks say to each other over the control connection: one union of small structs, in MessagePack.

Rank 0 decides and the others follow, so what goes down is complete: a :class:`Form` carries the members and the tables of
all sequences, a :class:`Step` all that the model is run on. Every rank applies the same steps in the same order to its
tables, so no control data is ever asked for. What goes up says who a rank is (:class:`Join`), that it is alive
(:class:`Heartbeat`), what it has done (:class:`Done`) and what broke (:class:`Fault`).

Everything but ``Join``, ``Loading``, ``Leave`` and ``Refused`` carries the epoch; a receiver drops what is not of its own
epoch, so a rank that was cut off cannot harm the ring that went on without it.
"""

from array import array
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import msgspec

TYPECODE: Final = "I"
"""Of packed tokens, in the words of :mod:`array`: unsigned, 4 bytes each."""


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of the union: the tag on the wire is the name of the class."""


class Positions(msgspec.Struct, frozen=True, array_like=True):
    """Positions ``first``, ``first + step``, ...: a :class:`kvplane_runtime.ring.ranges.Run` on the wire."""

    first: int
    count: int
    step: int = 1


class Window(msgspec.Struct, frozen=True):
    """The missing positions of ``start`` to ``start + len(tokens)``, at least one, whose KV is computed by this step.

    After a loss some of these positions may be there, and are left as they are, and later ones too: who sees whom is decided
    by position, never by the order of arrival. ``logits``: those of the last token, which is missing, go to rank 0.
    """

    sequence: int
    start: int
    tokens: list[int]
    """Of all positions, those that are there included."""
    placement: Literal["zigzag"] | int
    """Cut over all ranks, or whole on this rank (only where no other rank holds KV of the sequence)."""
    logits: bool


class Decode(msgspec.Struct, frozen=True, array_like=True):
    """One token of a sequence whose prompt is done; its KV goes to rank ``position % ranks``, its logits to rank 0."""

    sequence: int
    position: int
    token: int


class Fork(msgspec.Struct, frozen=True, array_like=True):
    """``child`` is a new sequence that begins as ``parent``'s positions 0 to ``length``, on the same ranks; KV is copied.

    The parent has all these positions. From here on the two know nothing of each other.
    """

    parent: int
    child: int
    length: int


class Truncate(msgspec.Struct, frozen=True, array_like=True):
    """The KV of ``sequence`` at ``length`` and beyond is given up; the positions before stay."""

    sequence: int
    length: int


class Step(Message, frozen=True, tag=True):
    """One turn of the ring. Each rank does, in this order: releases, truncations, forks, the decode batch, the window.

    A sequence is created by its first window or by a fork; the release of one that a rank does not know does nothing, so
    that a step may be sent again after a new epoch. Rank 0 gets one row of logits for each ``decode``, in that order,
    and then one for the window where its ``logits`` is set.
    """

    epoch: int
    number: int
    """Counts the steps of the epoch from 0."""
    decode: list[Decode] = []
    window: Window | None = None
    release: list[int] = []
    truncate: list[Truncate] = []
    fork: list[Fork] = []


class Table(msgspec.Struct, frozen=True):
    """What is known of one sequence, enough to build it up again: its tokens, and who holds the KV of which positions.

    The tokens are packed, because they are millions: to read ten million as numbers takes 1.5 s, in which the interpreter's lock
    is held and no heartbeat is sent, longer than a rank may be silent.
    """

    sequence: int
    packed: bytes
    """The tokens of positions 0 on: all positions that hold KV, or held it before a rank was lost."""
    held: list[list[Positions]]
    """By rank, in slot order. In a ``Form`` by the new ranks; a position that nobody holds is missing."""

    def __post_init__(self) -> None:
        if len(self.packed) % array(TYPECODE).itemsize:
            raise ValueError(f"The {len(self.packed)} bytes of a sequence's tokens are no whole number of them.")

    @classmethod
    def of(cls, sequence: int, tokens: Sequence[int], held: list[list[Positions]]) -> "Table":
        """With the tokens packed."""
        packed = tokens if isinstance(tokens, array | memoryview) else array(TYPECODE, tokens)
        return cls(sequence, packed.tobytes(), held)

    @property
    def tokens(self) -> Sequence[int]:
        """Unpacked where they are looked at, without a copy."""
        return memoryview(self.packed).cast(TYPECODE)


class Member(msgspec.Struct, frozen=True):
    """A rank's process as rank 0 knows it."""

    ordinal: int
    """Of the pod, by its host name. Ranks are the members of an epoch in the order of their ordinals."""
    pod_uid: str
    process: str
    """Drawn at random when the process starts: the same value, the same memory and KV."""
    address: str
    """``host:port`` where other ranks reach it."""


class Join(Message, frozen=True, tag=True):
    """A process has loaded its model, or lost its rank 0, and asks to be a member of the next epoch."""

    member: Member
    world_size: int
    """As it was told."""
    config_hash: str
    """Of the model's configuration and weights, the data type, the settings and the program's version: equal on all ranks."""
    capacity_tokens: int
    """KV tokens that this rank can hold."""
    epoch: int = -1
    """The last epoch it was a member of; -1: none."""
    tables: list[Table] = []
    """What it knows of the sequences of that epoch, for a rank 0 that knows nothing."""


class Loading(Message, frozen=True, tag=True):
    """How far a process is with its weights; sent before ``Join``."""

    ordinal: int
    loaded_bytes: int
    total_bytes: int


class Refused(Message, frozen=True, tag=True):
    """A process cannot be a member; the reason is a whole sentence. It ends with it."""

    reason: str


class Form(Message, frozen=True, tag=True):
    """A new epoch: leave what you wait for, and make the ring of these members.

    A rank keeps the KV of the ranges that ``tables`` gives it and drops all else: sequences that are not named, and what
    an unfinished step left.
    """

    epoch: int
    rank: int
    """The receiver's."""
    members: list[Member]
    """By rank."""
    store: str
    """``host:port`` of the rendezvous store."""
    tables: list[Table] = []


class Formed(Message, frozen=True, tag=True):
    """This rank's side of the ring of ``epoch`` is up."""

    epoch: int
    rank: int


class Heartbeat(Message, frozen=True, tag=True):
    """I live. Sent both ways at a fixed interval, whatever else is sent."""

    epoch: int
    formed: bool = False
    """From rank 0: all members are inside the ring of this epoch, and it works."""


class Traffic(msgspec.Struct, frozen=True, array_like=True):
    """What a step cost one rank."""

    seconds: float
    compute_seconds: float
    waited_seconds: float
    """Communication that no computation hid."""
    sent_bytes: int


class Done(Message, frozen=True, tag=True):
    """This rank has finished a step."""

    epoch: int
    rank: int
    number: int
    traffic: Traffic


class Fault(Message, frozen=True, tag=True):
    """This rank could not finish a step; it has left the ring of ``epoch`` and waits for the next ``Form``."""

    epoch: int
    rank: int
    number: int
    reason: str
    suspect: int | None = None
    """The rank it was waiting for, where it knows."""


class Leave(Message, frozen=True, tag=True):
    """This process is told to end. It takes part in the step under way; then rank 0 closes its connection."""


AnyMessage = Step | Join | Loading | Refused | Form | Formed | Heartbeat | Done | Fault | Leave

_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(AnyMessage)


class MalformedMessageError(Exception):
    """The bytes are none of the messages above: the peer runs another version, or is no rank."""


def encode(message: AnyMessage) -> bytes:
    """``message`` as MessagePack, without framing."""
    return _ENCODER.encode(message)


class _Form(msgspec.Struct, frozen=True, tag="Form"):
    """A ``Form`` as it is written: the tables, its last field, are bytes that may follow it."""

    epoch: int
    rank: int
    members: list[Member]
    store: str
    tables: msgspec.Raw


def encode_forms(forms: Mapping[int, Form]) -> tuple[dict[int, bytes], bytes]:
    """Each of the ``forms``, which have the same tables, as a head of its own and a rest that all share.

    The rest holds all tokens of the ring. It is encoded once, since no heartbeat is sent meanwhile, and is there once.
    """
    rest = _ENCODER.encode(next(iter(forms.values())).tables) if forms else b""
    heads = {
        key: _ENCODER.encode(_Form(form.epoch, form.rank, form.members, form.store, msgspec.Raw()))
        for key, form in forms.items()
    }
    return heads, rest


def decode(data: bytes | bytearray | memoryview) -> AnyMessage:
    """The message in ``data``; raises MalformedMessageError."""
    try:
        message: AnyMessage = _DECODER.decode(data)
    except msgspec.MsgspecError as error:
        raise MalformedMessageError(
            f"The bytes are no message of this version ({error}); run one version on all ranks."
        ) from error
    return message
