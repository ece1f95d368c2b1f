"""The simulated engine's KV events on sockets, as vLLM 0.32 sends them (``vllm/distributed/kv_events.py``).

A PUB socket with one message per step that changed the cache: topic, sequence number, msgpack of [time, events, rank]; and
a ROUTER socket that sends again what a subscriber asks for, of the last 10,000 messages.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import zmq
import zmq.asyncio

from bench.engine.blocks import Removed, Stored

_BUFFER_STEPS: Final = 10_000
_END: Final = (-1).to_bytes(8, "big", signed=True)
_MEDIUM: Final = "GPU"


class KvEventPublisher:
    """Binds both endpoints (``ipc://PATH``) until ``close``."""

    def __init__(self, *, endpoint: str, replay_endpoint: str, block_size: int) -> None:
        self._block_size = block_size
        self._context = zmq.asyncio.Context()
        self._publisher = self._context.socket(zmq.PUB)
        self._replay = self._context.socket(zmq.ROUTER)
        self._publisher.bind(endpoint)
        self._replay.bind(replay_endpoint)
        self._sequence = 0
        self._sent: deque[tuple[bytes, bytes]] = deque(maxlen=_BUFFER_STEPS)
        self._serving = asyncio.create_task(self._serve_replays())

    async def publish(
        self, events: Sequence[Stored | Removed], *, at: float, token_ids: Callable[[Stored], list[int]]
    ) -> None:
        """One message; ``at`` in seconds since 1970. ``token_ids``: what stored blocks hold."""
        payload = msgspec.msgpack.encode([at, [self._event(event, token_ids) for event in events], 0])
        sequence = self._sequence.to_bytes(8, "big")
        self._sequence += 1
        self._sent.append((sequence, payload))
        await self._publisher.send_multipart((b"", sequence, payload))

    async def close(self) -> None:
        """Close the sockets; what was not delivered is lost."""
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)
        self._context.destroy(linger=0)

    def _event(self, event: Stored | Removed, token_ids: Callable[[Stored], list[int]]) -> dict[str, Any]:
        if isinstance(event, Removed):
            return {"type": "BlockRemoved", "block_hashes": [event.hash], "medium": _MEDIUM, "group_idx": 0}
        return {
            "type": "BlockStored",
            "block_hashes": list(event.hashes),
            "parent_block_hash": event.parent,
            "token_ids": token_ids(event),
            "block_size": self._block_size,
            "lora_id": None,
            "medium": _MEDIUM,
            "lora_name": None,
            "group_idx": 0,
            "kv_cache_spec_kind": "full_attention",
        }

    async def _serve_replays(self) -> None:
        while True:
            frames = await self._replay.recv_multipart()
            if len(frames) != 3:
                continue
            client, _, wanted = frames
            for sequence, payload in tuple(self._sent):
                if sequence >= wanted:
                    await self._replay.send_multipart((client, b"", b"", sequence, payload))
            await self._replay.send_multipart((client, b"", b"", _END, b""))
