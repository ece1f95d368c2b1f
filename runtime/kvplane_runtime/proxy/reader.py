"""Reads request bodies without holding up the event loop, whatever their size.

A JSON parser holds the interpreter's lock for a whole document: 50 MB of token ids stop every stream for more than a
second, in a thread just as on the loop. So a small body is read at once, and a large one by a child process that takes
one after another and is started with the first. The child also bounds what a hostile body can do: it has its own memory
limit (a 16 MB list of empty lists takes 350 MB) and a deadline; a body that breaks it is refused, and the next one gets a
new child. It ends when its input ends, so it cannot outlive its parent.
"""

import asyncio
import contextlib
import os
import resource
import signal
import sys
from dataclasses import dataclass
from typing import BinaryIO, Final

import msgspec

from kvplane_runtime.proxy.gate import Refusal
from kvplane_runtime.proxy.openai import Endpoint, Generation, parse

INLINE_BYTES: Final = 128 * 1024
"""Largest body read on the loop: 0.2 ms of text, at worst 2 ms of token ids."""
MEMORY_BYTES: Final = 512 * 1024 * 1024
"""Data that the child may allocate; 50 MB of text take 200 MB."""
SECONDS: Final = 30.0
"""Longest time for one body; 50 MB of token ids take 2 s of a core of one's own."""
_MAX_REPLY_BYTES: Final = 1024 * 1024

_TOO_COMPLEX: Final = Refusal(
    400,
    "body_too_complex",
    "The request body holds more values than can be read; send fewer, or fewer prompts at once.",
)
_NO_READER: Final = Refusal(503, "proxy_overloaded", "No large request body can be read here now; retry soon.", 1)


@dataclass(frozen=True, slots=True)
class _Reply:
    """What the child says; one of the two."""

    generation: Generation | None
    refusal: Refusal | None


class BodyReader:
    """``openai.parse`` for bodies of any size."""

    def __init__(self, *, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._turn = asyncio.Lock()
        self._child: asyncio.subprocess.Process | None = None

    @staticmethod
    def read_now(endpoint: Endpoint, body: bytes | bytearray) -> Generation | Refusal | None:
        """What ``body`` asks for, or the refusal that it deserves; None for a large one, which takes its time."""
        return parse(endpoint, body) if len(body) <= INLINE_BYTES else None

    async def read(self, endpoint: Endpoint, body: bytes | bytearray) -> Generation | Refusal:
        """The same for a body of any size, which must not change meanwhile."""
        if (read := self.read_now(endpoint, body)) is not None:
            return read
        async with self._turn:
            if self._child is None:
                try:
                    self._child = await _start()
                except OSError:  # no process, descriptor or memory left
                    return _NO_READER
            try:
                async with asyncio.timeout(self._seconds):
                    return await _ask(self._child, endpoint, body)
            except (TimeoutError, EOFError, ConnectionError):
                await self._stop()
                return _TOO_COMPLEX
            except asyncio.CancelledError:  # its answer would be taken for the next body's
                await self._stop()
                raise

    async def close(self) -> None:
        """Ends the child."""
        async with self._turn:
            await self._stop()

    async def _stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()


async def _start() -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        __name__,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_MAX_REPLY_BYTES,
    )


async def _ask(child: asyncio.subprocess.Process, endpoint: Endpoint, body: bytes | bytearray) -> Generation | Refusal:
    assert child.stdin is not None and child.stdout is not None  # noqa: S101  (it was started with pipes)
    child.stdin.write(b"%d %d\n" % (endpoint.value, len(body)))
    child.stdin.write(body)
    await child.stdin.drain()
    reply = msgspec.json.decode(await child.stdout.readuntil(b"\n"), type=_Reply)
    result = reply.generation or reply.refusal
    assert result is not None  # noqa: S101  (it is one of the two)
    return result


# The child.


def _serve(bodies: BinaryIO, replies: BinaryIO) -> None:
    """Answers each ``ENDPOINT LENGTH\\n`` and that many bytes with one line; returns at the end of the input."""
    while line := bodies.readline():
        endpoint, length = map(int, line.split())
        body = bytearray(length)
        if bodies.readinto(body) != length:  # type: ignore[attr-defined]  # a BufferedReader has it
            return
        try:
            result = parse(Endpoint(endpoint), body)
        except MemoryError:
            result = _TOO_COMPLEX
        reply = _Reply(result, None) if isinstance(result, Generation) else _Reply(None, result)
        replies.write(msgspec.json.encode(reply) + b"\n")
        replies.flush()


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when it is over
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    os.nice(5)  # streams first
    _serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    _main()
