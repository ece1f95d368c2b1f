"""KV events from bytes and sockets into the ledger: as vLLM writes them, and when they are lost, late, foreign or garbage.

``kv_events/vllm-0.32.0.recorded.txt`` was written by vLLM's own classes (see its head). The publisher here behaves on its
sockets like vLLM's ZmqEventPublisher, and loses what it is told to.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import zmq
import zmq.asyncio
from hypothesis import given
from hypothesis import strategies as st

from kvplane_runtime.sidecar.kv_events import KvEventReader, decode
from kvplane_runtime.signals.ledger import BlocksRemoved, BlocksStored, CacheCleared, KvEventLedger
from tests.sidecar.kv_event_files import recorded

RECORDED = recorded("0.32.0")
STORED = {
    "type": "BlockStored",
    "block_hashes": [11, 12],
    "parent_block_hash": 10,
    "token_ids": list(range(32)),
    "block_size": 16,
    "lora_id": None,
    "medium": "GPU",
    "lora_name": None,
}
REMOVED = {"type": "BlockRemoved", "block_hashes": [11], "medium": "GPU"}
CLEARED = {"type": "AllBlocksCleared"}
_END = -1


def packed(*events: object, ts: float = 5.0) -> bytes:
    """As 0.32 writes a batch: an array with maps in it."""
    return msgspec.msgpack.encode([ts, events, 0])


def test_what_vllm_wrote_is_read_to_the_last_event() -> None:
    ledger = KvEventLedger()
    for sequence, payload in RECORDED:
        batch = decode(sequence, payload)
        assert batch.events
        ledger.apply(batch, batch.timestamp)
    assert (ledger.batches_total, ledger.holes, ledger.unreadable_total, ledger.untracked_total) == (204, 0, 0, 0)
    assert 0 < ledger.cached_blocks <= 40
    assert ledger.evictions_total == ledger.stored_blocks_total - ledger.cached_blocks
    assert ledger.recomputed_tokens_total == 16 * ledger.restored_blocks_total > 0


@pytest.mark.parametrize(
    "payload",
    [
        packed(STORED, REMOVED, CLEARED),
        msgspec.msgpack.encode({"ts": 5.0, "events": [STORED, REMOVED, CLEARED], "data_parallel_rank": 0}),
        msgspec.msgpack.encode(
            [5.0, [["BlockStored", [11, 12], 10, [1, 2], 16, None], ["BlockRemoved", [11]], ["AllBlocksCleared"]]]
        ),
        msgspec.msgpack.encode(
            [
                5.0,
                [
                    ["BlockStored", [11, 12], 10, [1, 2], 16, None, "GPU", "lora", [None, None], 0, "full_attention"],
                    ["BlockRemoved", [11], "GPU", 0],
                    ["AllBlocksCleared"],
                ],
                0,
            ]
        ),
        packed(STORED | {"locality": "LOCAL", "of_a_later_version": {"a": [1]}}, REMOVED | {"new": 1}, CLEARED),
    ],
    ids=["0.32", "maps", "0.9", "longer arrays", "unknown fields"],
)
def test_every_layout_says_the_same(payload: bytes) -> None:
    batch = decode(7, payload)
    assert (batch.sequence, batch.timestamp, batch.unreadable_events) == (7, 5.0, 0)
    assert batch.events == (BlocksStored((11, 12), 16), BlocksRemoved((11,)), CacheCleared())


def test_hashes_may_be_bytes_and_groups_are_apart() -> None:
    event = REMOVED | {"block_hashes": [b"a" * 32]}
    (first, second) = decode(0, packed(event | {"group_idx": 0}, event | {"group_idx": 1})).events
    assert first == BlocksRemoved((b"a" * 32,))
    assert second == BlocksRemoved(((1, b"a" * 32),))


def test_a_block_without_a_parent_begins_a_text() -> None:
    (event,) = decode(0, packed(STORED | {"parent_block_hash": None})).events
    assert event == BlocksStored((11, 12), 16, from_start=True)


def test_tokens_are_counted_in_the_first_group_only() -> None:
    batch = decode(0, packed(STORED | {"group_idx": 0}, STORED | {"group_idx": 1}))
    assert batch.events == (BlocksStored((11, 12), 16), BlocksStored(((1, 11), (1, 12)), 0))


def test_other_tiers_are_not_the_engines_memory() -> None:
    batch = decode(0, packed(STORED | {"medium": "CPU"}, REMOVED | {"medium": "STORAGE"}, STORED | {"medium": None}))
    assert batch.events == (BlocksStored((11, 12), 16),)
    assert batch.unreadable_events == 0


def test_an_unreadable_event_costs_only_itself() -> None:
    odd = [{"type": "BlockMoved"}, {"type": "BlockStored"}, 7, ["BlockStored"], STORED | {"block_size": -1}, None, {}]
    batch = decode(0, packed(*odd, REMOVED))
    assert batch.events == (BlocksRemoved((11,)),)
    assert batch.unreadable_events == len(odd)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x93",
        b"\x80",
        b"\x90",
        packed()[:-1],
        packed(ts=float("inf")),
        b"\x91" * 100_000,
        b"{}",
        b"\xde",
    ],
)
def test_what_is_no_batch_is_an_error(payload: bytes) -> None:
    with pytest.raises(ValueError, match="KV event batch 3 cannot be read"):
        decode(3, payload)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_batch_or_an_error(payload: bytes) -> None:
    with contextlib.suppress(ValueError):
        decode(0, payload)


@given(st.sampled_from(RECORDED[:20]), st.data())
def test_any_damage_is_survived(line: tuple[int, bytes], data: st.DataObject) -> None:
    damaged = bytearray(line[1])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    ledger = KvEventLedger()
    with contextlib.suppress(ValueError):
        ledger.apply(decode(line[0], bytes(damaged)), 0.0)


@dataclass
class Publisher:
    """One life of an engine: PUB, as XPUB, which also tells of subscribers, and ROUTER on two ipc endpoints."""

    folder: Path
    topic_in_replay: bool = True
    """0.32 has it, earlier versions have not."""
    buffer: list[tuple[int, bytes]] = field(default_factory=list)
    dropped_in_replay: set[int] = field(default_factory=set)
    """Left out once, as a ROUTER does whose peer is slow; _END is the end marker."""
    asked: list[int] = field(default_factory=list)

    @property
    def endpoints(self) -> tuple[str, str]:
        return f"ipc://{self.folder}/events", f"ipc://{self.folder}/replay"

    async def __aenter__(self) -> "Publisher":
        self._numbers = itertools.count()
        self._context = zmq.asyncio.Context()
        self._events, self._replay = self._context.socket(zmq.XPUB), self._context.socket(zmq.ROUTER)
        self._events.bind(self.endpoints[0])
        self._replay.bind(self.endpoints[1])
        self._task = asyncio.create_task(self._answer())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._context.destroy(linger=0)

    async def subscribed(self) -> None:
        """Returns when somebody is there to whom everything is sent from now on."""
        async with asyncio.timeout(20):
            assert await self._events.recv() == b"\x01"

    async def publish(self, *events: object, lost: bool = False, payload: bytes | None = None) -> None:
        number = next(self._numbers)
        payload = payload or packed(*events, ts=time.time())
        self.buffer.append((number, payload))
        if not lost:
            await self._events.send_multipart((b"", number.to_bytes(8, "big"), payload))

    async def send(self, *frames: bytes) -> None:
        await self._events.send_multipart(frames)

    async def _answer(self) -> None:
        topic = (b"",) if self.topic_in_replay else ()
        while True:
            client, empty, start = await self._replay.recv_multipart()
            self.asked.append(int.from_bytes(start, "big"))
            for number, payload in self.buffer:
                if number in self.dropped_in_replay:
                    self.dropped_in_replay.discard(number)
                elif number >= self.asked[-1]:
                    await self._replay.send_multipart((client, empty, *topic, number.to_bytes(8, "big"), payload))
            if _END in self.dropped_in_replay:
                self.dropped_in_replay.discard(_END)
                continue
            await self._replay.send_multipart((client, empty, *topic, (-1).to_bytes(8, "big", signed=True), b""))


@contextlib.asynccontextmanager
async def reading(publisher: Publisher, *, idle_seconds: float = 0.05) -> AsyncIterator[KvEventLedger]:
    ledger = KvEventLedger()
    events, replay = publisher.endpoints
    reader = KvEventReader(
        ledger=ledger,
        clock=time.monotonic,
        events_endpoint=events,
        replay_endpoint=replay,
        idle_seconds=idle_seconds,
        replay_silence_seconds=0.05,
    )
    task = asyncio.create_task(reader.run())
    try:
        yield ledger
        assert not task.done(), task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  (there is nothing to be woken by)
            await asyncio.sleep(0.005)


async def connected(publisher: Publisher, ledger: KvEventLedger) -> None:
    """A subscriber is there only some time after it connected: publishes until a batch arrives without being asked for."""
    await until(lambda: ledger.heard_at is not None)
    async with asyncio.timeout(20):
        while True:
            asked = len(publisher.asked)
            await publisher.publish(STORED)
            await until(lambda: ledger.next_sequence == len(publisher.buffer))
            if len(publisher.asked) == asked:
                return


def hashes(*numbers: int) -> dict[str, object]:
    return STORED | {"block_hashes": numbers}


async def test_a_reader_that_comes_late_gets_everything(tmp_path: Path) -> None:
    async with Publisher(tmp_path) as publisher:
        for number in range(5):
            await publisher.publish(hashes(number))
        async with reading(publisher) as ledger:
            await until(lambda: ledger.batches_total == 5)
            assert (ledger.cached_blocks, ledger.holes) == (5, 0)


async def test_a_reader_that_is_first_waits_for_the_engine(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path)
    async with reading(publisher) as ledger:
        await asyncio.sleep(0.2)
        assert ledger.heard_at is None
        async with publisher:
            await publisher.publish(hashes(1, 2, 3))
            await until(lambda: ledger.cached_blocks == 3)
            assert ledger.holes == 0


@pytest.mark.parametrize("topic_in_replay", [True, False])
async def test_a_gap_is_filled_by_the_replay(tmp_path: Path, topic_in_replay: bool) -> None:
    async with Publisher(tmp_path, topic_in_replay=topic_in_replay) as publisher, reading(publisher) as ledger:
        await connected(publisher, ledger)
        for number in range(100, 110):
            await publisher.publish(hashes(number), lost=number != 109)
        await until(lambda: ledger.next_sequence == len(publisher.buffer))
        assert ledger.stored_blocks_total - 2 * (len(publisher.buffer) - 10) == 10
        assert (ledger.holes, ledger.batches_total) == (0, len(publisher.buffer))


async def test_a_lost_last_batch_is_asked_for_in_the_silence(tmp_path: Path) -> None:
    async with Publisher(tmp_path) as publisher, reading(publisher) as ledger:
        await connected(publisher, ledger)
        await publisher.publish(hashes(100), lost=True)
        await until(lambda: ledger.next_sequence == len(publisher.buffer))
        assert ledger.holes == 0


async def test_a_replay_with_gaps_is_asked_again(tmp_path: Path) -> None:
    async with Publisher(tmp_path) as publisher, reading(publisher) as ledger:
        await connected(publisher, ledger)
        first = len(publisher.buffer)
        publisher.dropped_in_replay = {first + 2, first + 5, _END}
        for number in range(100, 110):
            await publisher.publish(hashes(number), lost=True)
        await until(lambda: ledger.next_sequence == len(publisher.buffer))
        assert (ledger.holes, publisher.dropped_in_replay) == (0, set())


async def test_what_the_replay_has_no_more_is_a_hole(tmp_path: Path) -> None:
    async with Publisher(tmp_path) as publisher, reading(publisher) as ledger:
        await connected(publisher, ledger)
        for number in range(100, 110):
            await publisher.publish(hashes(number), lost=True)
            if number < 104:
                publisher.buffer.pop()
        await until(lambda: ledger.holes > 0)
        await until(lambda: ledger.cached_blocks == 6)
        assert ledger.holes == 4


async def test_an_engine_that_starts_again_is_followed_from_its_first_batch(tmp_path: Path) -> None:
    async with Publisher(tmp_path) as first, reading(first) as ledger:
        await connected(first, ledger)
        for number in range(100, 150):
            await first.publish(hashes(number))
        await until(lambda: ledger.next_sequence == len(first.buffer))
        await first.__aexit__()
        async with Publisher(tmp_path) as second:
            async with asyncio.timeout(20):
                while ledger.cached_blocks != len(
                    second.buffer
                ):  # its first batches come before we are connected again
                    await second.publish(hashes(100 + len(second.buffer)))
                    await asyncio.sleep(0.02)
            assert ledger.next_sequence == len(second.buffer)
            assert (ledger.holes, ledger.restored_blocks_total) == (0, 0)


async def test_garbage_is_counted_and_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Never idle: a replay would read the garbage once more.
    async with Publisher(tmp_path) as publisher, reading(publisher, idle_seconds=60) as ledger:
        await publisher.subscribed()
        await publisher.publish(STORED)
        await publisher.send(b"alone")
        await publisher.send(b"", b"short", b"x")
        await publisher.send(b"", b"\xff" * 8, packed(STORED))  # what ends a replay
        await publisher.publish(payload=b"\xc1 garbage")
        await publisher.publish(hashes(100, 101, 102))
        await until(lambda: ledger.next_sequence == len(publisher.buffer))
        assert (ledger.unreadable_total, ledger.holes, ledger.cached_blocks) == (4, 1, 3)
        assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


async def test_garbage_in_a_replay_ends_only_that_answer(tmp_path: Path) -> None:
    context = zmq.asyncio.Context()
    publisher = Publisher(tmp_path)
    replay = context.socket(zmq.ROUTER)
    replay.bind(publisher.endpoints[1])
    try:
        async with reading(publisher) as ledger:
            for _ in range(3):
                client, empty, _start = await replay.recv_multipart()
                await replay.send_multipart((client, empty, b"garbage"))
            await until(lambda: ledger.unreadable_total >= 2)
            assert ledger.heard_at is None
    finally:
        context.destroy(linger=0)
