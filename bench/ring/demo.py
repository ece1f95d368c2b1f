"""``python -m bench.ring.demo``: one long prompt over a ring on this machine, with its progress and the memory of each rank.

A small model is made in code and served by ``kvplane-ring local``, as anybody would; each rank has room for its share of the
prompt and a fifth more, so that no rank could hold it alone. What is left in the end is what was printed.
"""

import argparse
import asyncio
import collections
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import aiohttp

from bench import report
from bench.ring import models
from bench.ring.ranks import HOST, processors, prompt
from bench.ring.served import ROOT, START_SECONDS, Answer, ask, write
from e2e.cluster.ports import free_ports
from e2e.cluster.progress import Progress

TOKENS: Final = 100_000
RANKS: Final = 4
ANSWER: Final = 50
LOOK_SECONDS: Final = 0.5
STOP_SECONDS: Final = 30.0
_FORMED: Final = re.compile(r"is formed \(rank:pid (?P<pids>[0-9: ]+)\)")


class Local:
    """``kvplane-ring local``, as long as the context lasts."""

    def __init__(self, model: Path, *, ranks: int, room: int) -> None:
        (port,) = free_ports(1)
        self.url = f"http://{HOST}:{port}"
        self.command = ["-m", "kvplane_runtime.ring", "local", "--ranks", str(ranks), "--model", str(model)]
        self.room = room
        self._port = port
        self._said: collections.deque[str] = collections.deque(maxlen=40)
        self._pids: dict[int, int] = {}
        self._formed = threading.Event()

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, *self.command, "--port", str(self._port)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("operator", "runtime")),
                "KVPLANE_RING_KV_TOKENS": str(self.room),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its ranks end with it
            self._process.wait()
        self._listener.join()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def formed(self) -> dict[int, int]:
        """Waits for the ring; the process of each rank. Raises RuntimeError with what was said last where none comes."""
        end = time.monotonic() + START_SECONDS
        while not self._formed.wait(LOOK_SECONDS):
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("No ring was formed:\n" + "\n".join(self._said))
        return self._pids

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.append(line.rstrip())
            if found := _FORMED.search(line):
                pairs = (pair.split(":") for pair in found["pids"].split())
                self._pids = {int(rank): int(pid) for rank, pid in pairs}
                self._formed.set()


def mebibytes(pid: int, what: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (at most) of a process (proc(5))."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{what}:"))


async def ring(url: str) -> dict[str, Any]:
    """What ``/state`` says of the ring."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/state") as answer:
        return dict((await answer.json())["ring"])


async def at_rest(url: str) -> dict[str, Any]:
    """What ``/state`` says of the ring when it has nothing to do: rank 0 tells a step there after the step's tokens."""
    while True:
        async with aiohttp.ClientSession() as session, session.get(f"{url}/state") as answer:
            state = await answer.json()
        if state["engine"]["requestsRunning"] + state["engine"]["requestsWaiting"] == 0:
            return dict(state["ring"])
        await asyncio.sleep(LOOK_SECONDS)


async def answered(local: Local, ids: list[int], *, count: int, pids: dict[int, int], progress: Progress) -> Answer:
    """Asks, and shows how far the prompt is and what each rank holds until the answer is complete."""
    answer = Answer()
    with progress.step(f"{len(ids)} tokens over {len(pids)} ranks") as step:
        asking = asyncio.create_task(ask(local.url, "model", ids, count=count, into=answer))
        while not asking.done():
            memory = " ".join(f"{mebibytes(pid, 'VmRSS'):.0f}" for pid in pids.values())
            held = " ".join(str(tokens) for tokens in (await ring(local.url))["kvTokens"])
            done = f"prefill {answer.prefilled}" if answer.first_seconds is None else f"{len(answer.tokens)} generated"
            step.detail = f"{done}, KV {held}, MiB {memory}"
            await asyncio.sleep(LOOK_SECONDS)
        await asking
        step.detail = f"{len(answer.tokens)} tokens generated"
    if answer.error is not None or answer.first_seconds is None:
        raise RuntimeError(f"The request failed: {answer.error}.")
    return answer


def summary(answer: Answer, *, tokens: int, pids: dict[int, int], state: dict[str, Any], room: int) -> str:
    """What there was to see."""
    assert answer.first_seconds is not None
    rows = [
        (str(rank), str(pid), str(state["kvTokens"][rank]), str(room), f"{mebibytes(pid, 'VmHWM'):.0f}")
        for rank, pid in pids.items()
    ]
    return (
        report.table(("rank", "process", "KV tokens", "room for", "MiB at most"), rows)
        + f"\n\nFirst token of {tokens} after {answer.first_seconds:.1f} s, {tokens / answer.first_seconds:.0f} tokens/s; "
        + f"then {len(answer.tokens) - 1} more. No rank had room for {tokens}."
    )


async def run(*, tokens: int, ranks: int, count: int) -> None:
    progress = Progress()
    with tempfile.TemporaryDirectory(prefix="kvplane-demo-ring-") as folder:
        with progress.step("a small Llama with random weights, made in code"):
            model = await asyncio.to_thread(write, models.LONG, Path(folder) / "model")
        room = -(-(tokens + count) * 6 // (5 * ranks))
        with Local(model, ranks=ranks, room=room) as local:
            with progress.step(f"a ring of {ranks} on {len(processors())} processors") as step:
                progress.say(f"KVPLANE_RING_KV_TOKENS={room} python {' '.join(local.command)}")
                pids = await asyncio.to_thread(local.formed)
                step.detail = "formed"
            ids = prompt(tokens, vocabulary=models.LONG.options["vocab_size"], seed=1)
            answer = await answered(local, ids, count=count, pids=pids, progress=progress)
            print(summary(answer, tokens=tokens, pids=pids, state=await at_rest(local.url), room=room))
    progress.say("The ring is stopped and its model removed.")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ring.demo", description=__doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the prompt [%(default)s]")
    parser.add_argument("--ranks", type=int, default=RANKS, help="processes [%(default)s]")
    parser.add_argument("--answer", type=int, default=ANSWER, help="tokens to generate [%(default)s]")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes are ended
    asyncio.run(run(tokens=arguments.tokens, ranks=arguments.ranks, count=arguments.answer))


if __name__ == "__main__":
    main()
