"""A ring of real processes on loopback, as its users meet it: started, asked, and hurt.

Each rank is pinned to a processor. Nothing restarts what a drill has killed but the drill itself.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import aiohttp

from bench.ring.ranks import HOST, processors
from e2e.cluster.ports import free_ports
from tests.ring.tiny import Tiny, build

ROOT: Final = Path(__file__).resolve().parents[2]
NAME: Final = "bench"
START_SECONDS: Final = 120.0
POLL_SECONDS: Final = 0.02
_PREFILL: Final = b": prefill "


@dataclass
class Answer:
    """A streamed completion; times are seconds from its request."""

    tokens: list[int] = field(default_factory=list)
    prefilled: int = 0
    """Tokens of the prompt that are computed, as the stream's comments say."""
    first_seconds: float | None = None
    error: str | None = None


async def ask(url: str, model: str, prompt: Sequence[int], *, count: int, into: Answer | None = None) -> Answer:
    """Greedy; ``into`` is filled as the tokens come."""
    answer = into or Answer()
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    timeout = aiohttp.ClientTimeout(total=None)
    began = time.perf_counter()
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.post(f"{url}/v1/completions", json=body) as response,
    ):
        async for line in response.content:
            if line.startswith(b"data: {"):
                _take(answer, json.loads(line[6:]), time.perf_counter() - began)
            elif line.startswith(_PREFILL):
                answer.prefilled = int(line.removeprefix(_PREFILL).partition(b"/")[0])
        if response.status != 200:
            answer.error = answer.error or f"status {response.status}"
    return answer


def _take(answer: Answer, event: Mapping[str, Any], seconds: float) -> None:
    if "error" in event:
        answer.error = str(event["error"]["message"])
    for choice in event.get("choices", ()):
        if answer.first_seconds is None:
            answer.first_seconds = seconds
        answer.tokens += choice.get("token_ids") or ()


def write(tiny: Tiny, folder: Path) -> Path:
    """The model as files."""
    build(tiny).save_pretrained(folder)
    return folder


def stretched(model: Path, folder: Path, *, positions: int) -> Path:
    """The same model, for contexts of so many tokens: its rotary positions do not depend on the bound."""
    folder.mkdir()
    for file in model.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    shutil.copy(model / "config.json", folder / "config.json")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions}))
    return folder


class Served:
    """The processes of one ring; ``async with`` starts them and waits until the ring is formed."""

    def __init__(self, model: Path, *, ranks: int, logs: Path, settings: Mapping[str, str]) -> None:
        self.ranks = ranks
        self._model, self._logs, self._settings = model, logs, settings
        self._control, self._store, *self._answers = free_ports(2 + ranks)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self.url = f"http://{HOST}:{self._answers[0]}"

    async def __aenter__(self) -> Self:
        try:
            for rank in range(self.ranks):
                self.start(rank)
            await self.formed(range(self.ranks))
        except BaseException:
            self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        self._end()

    def start(self, rank: int) -> None:
        """Starts a rank's process."""
        told = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("operator", "runtime")),
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(self.ranks),
            "PROMPT_SPLIT_STRATEGY": "RING",
            "POD_IP": HOST,
            "KVPLANE_RING_ORDINAL": str(rank),
            "KVPLANE_RING_LEADER": HOST,
            "KVPLANE_RING_MODEL": str(self._model),
            "KVPLANE_RING_SERVED_NAME": NAME,
            "KVPLANE_RING_DTYPE": "float32",
            "KVPLANE_RING_PORT": str(self._answers[0]),
            "KVPLANE_RING_WORKER_PORT": str(self._answers[rank]),
            "KVPLANE_RING_CONTROL_PORT": str(self._control),
            "KVPLANE_RING_STORE_PORT": str(self._store),
            "KVPLANE_RING_THREADS": "1",
            "KVPLANE_RING_PARENT": str(os.getpid()),
            **self._settings,
        }
        available = processors()
        processor = available[rank % len(available)]
        with (self._logs / f"rank-{rank}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "kvplane_runtime.ring", "serve"], env=told, stdout=log, stderr=subprocess.STDOUT
            )
        os.sched_setaffinity(process.pid, {processor})  # before it has any thread
        self._processes[rank] = process

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Sends a signal to a rank."""
        self._processes[rank].send_signal(number)

    def pids(self) -> dict[int, int]:
        """Process ids by rank."""
        return {rank: process.pid for rank, process in self._processes.items()}

    async def state(self) -> dict[str, Any]:
        """``/state``; empty while rank 0 does not answer."""
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session,
                session.get(f"{self.url}/state") as answer,
            ):
                return dict(await answer.json())
        except (aiohttp.ClientError, TimeoutError):
            return {}

    async def ring(self) -> dict[str, Any]:
        """What ``/state`` says of the ring; empty while rank 0 does not answer."""
        return dict((await self.state()).get("ring") or {})

    async def formed(self, members: Sequence[int] | range) -> dict[str, Any]:
        """Waits for a ring of these members; raises RuntimeError with the ends of the logs where none comes."""
        wanted, end = list(members), time.monotonic() + START_SECONDS
        while True:
            ring = await self.ring()
            if ring.get("formed") and ring["members"] == wanted:
                return ring
            if time.monotonic() > end:
                raise RuntimeError(f"No ring of {wanted} within {START_SECONDS:g} s; it is {ring}.\n{self._ends()}")
            await asyncio.sleep(POLL_SECONDS)

    async def ask(self, prompt: Sequence[int], *, count: int, into: Answer | None = None) -> Answer:
        """A greedy completion."""
        return await ask(self.url, NAME, prompt, count=count, into=into)

    def _ends(self) -> str:
        logs = sorted(self._logs.glob("rank-*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in logs)

    def _end(self) -> None:
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.kill()
        for process in self._processes.values():
            process.wait()
