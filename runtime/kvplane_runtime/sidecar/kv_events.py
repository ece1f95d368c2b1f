"""The engine's KV events, from its sockets into the ledger.

vLLM publishes one message per engine step: topic, sequence number, msgpack. PUB drops what a subscriber is too slow
for, or was not yet there for, so a gap is asked for on the replay socket, which knows the last 10,000 steps; so is what
follows the newest batch whenever the stream is silent, since a lost last batch shows no gap. Only what the replay cannot
give either is a hole in the ledger.

Nothing that arrives here may stop the sidecar: what cannot be read is counted, and a batch of which nothing can be read
is a hole. vLLM has written batches and events as arrays (0.9), both as maps, and maps in an array (0.32); each is told by
its first byte (vllm/distributed/kv_events.py). One publisher is read, that of data-parallel rank 0: 0.32 refuses ipc
endpoints for the others.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Annotated, Final

import msgspec
import zmq
import zmq.asyncio

from kvplane_api.names import KV_EVENTS_ENDPOINT, KV_REPLAY_ENDPOINT
from kvplane_runtime.signals.ledger import Batch, BlocksRemoved, BlocksStored, CacheCleared, Event, KvEventLedger

log = logging.getLogger(__name__)

IDLE_SECONDS: Final = 5.0
"""After this silence the replay socket is asked whether something was missed."""
REPLAY_SILENCE_SECONDS: Final = 2.0
"""vLLM looks for replay requests at least every 0.1 s; longer silence is no answer."""
REPLAY_PAUSE_SECONDS: Final = 0.25
"""Within an answer: after this its end is taken for dropped."""
_RECEIVE_LIMIT: Final = 1000
"""Messages held for us; beyond that the publisher drops, and the replay fills the gap."""
_MESSAGE_LIMIT_BYTES: Final = 64 * 1024 * 1024
_RECONNECT_MILLISECONDS: Final = (100, 2000)
_DEVICE: Final = ("GPU", None)
"""What vLLM calls the engine's own memory on every platform; events of other tiers (CPU, STORAGE) are not for us."""
_Count = Annotated[int, msgspec.Meta(ge=0)]
_END: Final = (1 << 64) - 1
"""Sequence (-1, unsigned) of the message that ends a replay."""


class _StoredMap(msgspec.Struct, tag="BlockStored"):
    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    block_size: _Count
    medium: str | None = None
    group_idx: int | None = None


class _RemovedMap(msgspec.Struct, tag="BlockRemoved"):
    block_hashes: list[int | bytes]
    medium: str | None = None
    group_idx: int | None = None


class _ClearedMap(msgspec.Struct, tag="AllBlocksCleared"):
    pass


class _BatchMap(msgspec.Struct):
    ts: float
    events: list[msgspec.Raw]


class _StoredArray(msgspec.Struct, array_like=True, tag="BlockStored"):
    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: msgspec.Raw
    block_size: _Count
    lora_id: msgspec.Raw = msgspec.Raw()
    medium: str | None = None
    lora_name: msgspec.Raw = msgspec.Raw()
    extra_keys: msgspec.Raw = msgspec.Raw()
    group_idx: int | None = None


class _RemovedArray(msgspec.Struct, array_like=True, tag="BlockRemoved"):
    block_hashes: list[int | bytes]
    medium: str | None = None
    group_idx: int | None = None


class _ClearedArray(msgspec.Struct, array_like=True, tag="AllBlocksCleared"):
    pass


class _BatchArray(msgspec.Struct, array_like=True):
    ts: float
    events: list[msgspec.Raw]


_BATCH_MAP: Final = msgspec.msgpack.Decoder(_BatchMap)
_BATCH_ARRAY: Final = msgspec.msgpack.Decoder(_BatchArray)
_EVENT_MAP: Final = msgspec.msgpack.Decoder(_StoredMap | _RemovedMap | _ClearedMap)
_EVENT_ARRAY: Final = msgspec.msgpack.Decoder(_StoredArray | _RemovedArray | _ClearedArray)
_UNREADABLE: Final = (msgspec.MsgspecError, ValueError, RecursionError)
"""What msgspec raises for bytes that are not what was expected: also text that is not UTF-8, and nesting without end."""


def decode(sequence: int, payload: bytes) -> Batch:
    """The batch in one message; raises ValueError if it is no batch. Token ids are skipped unread."""
    try:
        batch = (_BATCH_MAP if _is_map(payload) else _BATCH_ARRAY).decode(payload)
    except _UNREADABLE as error:
        raise ValueError(f"KV event batch {sequence} cannot be read: {error}.") from error
    if not math.isfinite(batch.ts):
        raise ValueError(f"KV event batch {sequence} cannot be read: its time is {batch.ts}.")
    events: list[Event] = []
    unreadable = 0
    for raw in batch.events:
        try:
            event = (_EVENT_MAP if _is_map(raw) else _EVENT_ARRAY).decode(raw)
        except _UNREADABLE:
            unreadable += 1
            continue
        match event:
            case _StoredMap() | _StoredArray() if event.medium in _DEVICE:
                size = 0 if event.group_idx else event.block_size  # other groups hold the same tokens once more
                blocks = _blocks(event.block_hashes, event.group_idx)
                events.append(BlocksStored(blocks, size, from_start=event.parent_block_hash is None))
            case _RemovedMap() | _RemovedArray() if event.medium in _DEVICE:
                events.append(BlocksRemoved(_blocks(event.block_hashes, event.group_idx)))
            case _ClearedMap() | _ClearedArray():
                events.append(CacheCleared())
    return Batch(sequence=sequence, timestamp=batch.ts, events=tuple(events), unreadable_events=unreadable)


def _is_map(message: bytes | msgspec.Raw) -> bool:
    """By the first byte: https://github.com/msgpack/msgpack/blob/master/spec.md#map-format-family."""
    first = bytes(memoryview(message)[:1])
    return b"\x80" <= first <= b"\x8f" or first in (b"\xde", b"\xdf")


def _blocks(hashes: list[int | bytes], group: int | None) -> tuple[Hashable, ...]:
    """Hashes; with the group of layers, except in the first group, which is the only one of most models."""
    return tuple((group, block) for block in hashes) if group else tuple(hashes)


class KvEventReader:
    """Follows one engine's events for as long as the sidecar runs, through every restart of the engine."""

    def __init__(
        self,
        *,
        ledger: KvEventLedger,
        clock: Callable[[], float],
        events_endpoint: str = KV_EVENTS_ENDPOINT,
        replay_endpoint: str = KV_REPLAY_ENDPOINT,
        idle_seconds: float = IDLE_SECONDS,
        replay_silence_seconds: float = REPLAY_SILENCE_SECONDS,
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._events_endpoint = events_endpoint
        self._replay_endpoint = replay_endpoint
        self._idle_seconds = idle_seconds
        self._replay_silence_seconds = replay_silence_seconds
        self._said_unreadable = False

    async def run(self) -> None:
        """Reads until cancelled. The sockets need not be there yet, and may go and come back."""
        context = zmq.asyncio.Context()
        try:
            events = _socket(context, zmq.SUB, self._events_endpoint)
            events.subscribe(b"")
            while True:
                if await events.poll(1000 * self._idle_seconds):
                    await self._take(context, await events.recv_multipart())
                else:
                    await self._catch_up(context)
        finally:
            context.destroy(linger=0)

    async def _take(self, context: zmq.asyncio.Context, frames: Sequence[bytes]) -> None:
        sequence = _sequence(frames)
        if sequence is None or sequence == _END:  # which no batch has, and none could come after
            self._unreadable(f"A message of {len(frames)} frames has no sequence number.")
            return
        batch = self._read(sequence, frames[-1])
        if batch is not None and self._ledger.is_of_new_life(batch):
            self._ledger.restarted()
        if sequence > self._ledger.next_sequence:
            await self._catch_up(context)
        self._enter(sequence, batch)
        await asyncio.sleep(0)

    async def _catch_up(self, context: zmq.asyncio.Context) -> None:
        """Enters what the engine still has beyond the newest batch."""
        while await self._replay(context):
            pass

    async def _replay(self, context: zmq.asyncio.Context) -> bool:
        """One answer of the replay socket; whether there is more to be asked for.

        The engine sends an answer in one go and its socket drops what does not fit into the queues between us, about two
        thousand batches: the middle of a long answer, and its end marker. What an answer begins with was never dropped,
        so a gap there is there for good.
        """
        replay = _socket(context, zmq.DEALER, self._replay_endpoint)
        try:
            first = self._ledger.next_sequence
            await replay.send_multipart((b"", first.to_bytes(8, "big")))
            patience = self._replay_silence_seconds
            while await replay.poll(1000 * patience):
                frames = await replay.recv_multipart()
                sequence = _sequence(frames)
                if sequence is None:
                    self._unreadable(f"A replayed message of {len(frames)} frames has no sequence number.")
                    return False
                self._ledger.heard(self._clock())
                progress = self._ledger.next_sequence > first
                if sequence == _END:
                    return False
                if progress and sequence > self._ledger.next_sequence:
                    return True
                self._enter(sequence, self._read(sequence, frames[-1]))
                patience = REPLAY_PAUSE_SECONDS
                await asyncio.sleep(0)  # receiving what is there already does not let others run
            return self._ledger.next_sequence > first
        finally:
            replay.close(linger=0)

    def _read(self, sequence: int, payload: bytes) -> Batch | None:
        try:
            return decode(sequence, payload)
        except ValueError as error:
            self._unreadable(str(error))
            return None

    def _enter(self, sequence: int, batch: Batch | None) -> None:
        if batch is None:
            self._ledger.lose(sequence)
        else:
            self._ledger.apply(batch, self._clock())

    def _unreadable(self, why: str) -> None:
        self._ledger.unreadable_total += 1
        if not self._said_unreadable:
            log.warning("%s What cannot be read is counted from now on, and not logged again.", why)
        self._said_unreadable = True


def _socket(context: zmq.asyncio.Context, kind: int, endpoint: str) -> zmq.asyncio.Socket:
    socket = context.socket(kind)
    socket.linger = 0
    socket.rcvhwm = _RECEIVE_LIMIT
    socket.maxmsgsize = _MESSAGE_LIMIT_BYTES
    socket.reconnect_ivl, socket.reconnect_ivl_max = _RECONNECT_MILLISECONDS
    socket.connect(endpoint)
    return socket


def _sequence(frames: Sequence[bytes]) -> int | None:
    """The frame before the payload, in live messages and in replayed ones; None if it is no sequence number."""
    if len(frames) < 2 or len(frames[-2]) != 8:
        return None
    return int.from_bytes(frames[-2], "big")
