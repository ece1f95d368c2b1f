"""A ring of real processes on loopback, with a small model on disk, as a test sees it: start, ask, kill, wait.

To import torch and transformers takes a process seconds of a core, and drills start many. So a rank is a fork of one process
that has imported them (:mod:`tests.ring.preloaded`): a process of its own for all that concerns the ring, with pid, memory,
signals and exit status. What a fork does not show is how an interpreter begins and ends; ``fresh`` ranks are started as users do.
"""

import contextlib
import functools
import http.client
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

from e2e.cluster.ports import free_ports
from kvplane_runtime.ring.__main__ import serve

HOST = "127.0.0.1"
LIMIT_SECONDS = 2.0
"""Silence after which a rank is lost: twice the default, since drills keep all cores of a machine busy, and none measures how
soon a loss is noticed."""
_PREFILL = b": prefill "
ROOT = Path(__file__).resolve().parents[2]
PYTHONPATH = os.pathsep.join(str(ROOT / folder) for folder in ("operator", "runtime", "."))


@dataclass
class Stream:
    """A streamed completion, read by a thread of its own."""

    tokens: list[int] = field(default_factory=list)
    prefilled: int = 0
    """Tokens of the prompt that are computed, as the stream's comments say."""
    finish: str | None = None
    error: dict[str, Any] | None = None
    broken: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    leave: int | None = None
    """The client goes away when it has so many tokens. 0: at the first line, which for a long prompt is one of its prefill."""
    over: threading.Event = field(default_factory=threading.Event)

    def read(self, request: urllib.request.Request) -> None:
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310  (of loopback)
                for line in answer:
                    if line.startswith(b"data: {"):
                        self._take(json.loads(line[6:]))
                    elif line.startswith(_PREFILL):
                        self.prefilled = int(line.removeprefix(_PREFILL).partition(b"/")[0])
                    if self.leave is not None and len(self.tokens) >= self.leave:
                        break
        except urllib.error.HTTPError as error:
            self.error = json.loads(error.read())["error"]
        except OSError as error:
            self.broken = str(error)
        except Exception as error:  # noqa: BLE001  (http.client has errors of its own for a connection that ends)
            self.broken = repr(error)
        finally:
            self.over.set()

    def _take(self, body: dict[str, Any]) -> None:
        if "error" in body:
            self.error = body["error"]
        for choice in body.get("choices", ()):
            self.tokens += choice.get("token_ids") or ()
            self.finish = choice["finish_reason"] or self.finish
        self.usage = body.get("usage") or self.usage


class Forked:
    """A rank that is a fork of a process with torch; to be used as a Popen is."""

    def __init__(self, told: dict[str, str], log: Path) -> None:
        # A daemon is ended with the tests, if nobody has done it before.
        self._process = _forks().Process(target=_rank, args=(told, log), daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("a forked rank", timeout or 0.0)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def _forks() -> ForkServerContext:
    """The process that is forked, begun by the first rank of this test process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ring.preloaded"])
    # One thread: numpy would begin others when it is imported, and a fork has only the one that forks.
    with mock.patch.dict(os.environ, {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}):
        forkserver.ensure_running()
    return context


def _rank(told: dict[str, str], log: Path) -> None:
    """What a fork does: ``kvplane-ring serve`` with that environment, until the process that was forked ends.

    With ``FAULT_AT_SAMPLE`` in the environment rank 0's model thread meets a fault of its own when it samples for that time.
    """
    with log.open("ab") as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
    os.environ.clear()
    os.environ.update(told, KVPLANE_RING_PARENT=str(os.getppid()))
    if "FAULT_AT_SAMPLE" in told:
        _fail_at(int(told["FAULT_AT_SAMPLE"]))
    sys.exit(serve(os.environ))


def _fail_at(number: int) -> None:
    from kvplane_runtime.ring import engine

    sample, numbers = engine.sample, itertools.count(1)

    def failing(*given: Any) -> Any:
        if next(numbers) == number:
            raise ZeroDivisionError
        return sample(*given)

    engine.sample = failing


class Processes:
    """The ranks of one ring."""

    def __init__(self, size: int, model: Path, logs: Path, *, fresh: bool = False, **settings: str) -> None:
        """``fresh``: each rank is a new interpreter."""
        self.size = size
        self.model = model
        self._logs = logs
        self._fresh = fresh
        self._settings = settings
        self.control_port, self._store, *self._answers = free_ports(2 + size)
        self.port = self._answers[0]
        self.ranks: dict[int, subprocess.Popen[bytes] | Forked] = {}

    def start(self, *ranks: int, **changed: str) -> None:
        for rank in ranks or range(self.size):
            self.ranks[rank] = self.launch(rank, **changed)

    def launch(self, rank: int, **changed: str) -> "subprocess.Popen[bytes] | Forked":
        told = {
            **os.environ,
            "PYTHONPATH": PYTHONPATH,
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(self.size),
            "PROMPT_SPLIT_STRATEGY": "RING",
            "POD_IP": HOST,
            "KVPLANE_RING_ORDINAL": str(rank),
            "KVPLANE_RING_LEADER": HOST,
            "KVPLANE_RING_MODEL": str(self.model),
            "KVPLANE_RING_SERVED_NAME": "tiny",
            "KVPLANE_RING_PORT": str(self.port),
            "KVPLANE_RING_WORKER_PORT": str(self._answers[rank]),
            "KVPLANE_RING_CONTROL_PORT": str(self.control_port),
            "KVPLANE_RING_STORE_PORT": str(self._store),
            "KVPLANE_RING_THREADS": "1",
            "KVPLANE_RING_KV_TOKENS": "4096",
            "KVPLANE_RING_WINDOW_TOKENS": "32",
            "KVPLANE_RING_SHORT_TOKENS": "8",
            "KVPLANE_RING_PARENT": str(os.getpid()),
            "KVPLANE_RING_DRAIN_SECONDS": "5",
            "KVPLANE_RING_HEARTBEAT_LIMIT_SECONDS": f"{LIMIT_SECONDS:g}",
            **self._settings,
            **changed,
        }
        path = self._logs / f"rank-{rank}.log"
        if not self._fresh:
            return Forked(told, path)
        with path.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "kvplane_runtime.ring", "serve"], env=told, stdout=log, stderr=subprocess.STDOUT
            )

    def log(self, rank: int) -> str:
        return (self._logs / f"rank-{rank}.log").read_text()

    def signal(self, rank: int, number: signal.Signals) -> None:
        self.ranks[rank].send_signal(number)
        if number == signal.SIGKILL:
            self.ranks[rank].wait()

    def state(self) -> dict[str, Any] | None:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self.port}/state", timeout=5) as answer:
                return dict(json.load(answer))
        except (OSError, http.client.HTTPException):
            return None

    def health(self, rank: int) -> int | None:
        """What a rank says to its sidecar; None where nobody answers."""
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self._answers[rank]}/health", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except OSError:
            return None

    def ring(self) -> dict[str, Any]:
        return (self.state() or {}).get("ring") or {}

    def until(self, what: Callable[[], bool], *, seconds: float = 90.0) -> None:
        end = time.monotonic() + seconds
        while not what():
            if time.monotonic() > end:
                logs = "\n".join(f"--- rank {rank}\n{self.log(rank)[-3000:]}" for rank in self.ranks)
                raise AssertionError(f"It does not come true; the state is {self.state()}.\n{logs}")
            time.sleep(0.05)

    def formed(self, *members: int, seconds: float = 90.0) -> None:
        wanted = list(members) or list(range(self.size))

        def there() -> bool:
            ring = self.ring()  # asked once: the next answer may be of another ring, or there may be none
            return bool(ring.get("formed") and ring["members"] == wanted)

        self.until(there, seconds=seconds)

    def ask(self, prompt: Sequence[int], count: int, *, leave: int | None = None) -> Stream:
        """Greedy; the answer is read in the background."""
        body = {
            "model": "tiny",
            "prompt": list(prompt),
            "max_tokens": count,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            f"http://{HOST}:{self.port}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        stream = Stream(leave=leave)
        threading.Thread(target=stream.read, args=(request,), daemon=True).start()
        return stream

    def close(self) -> None:
        for process in self.ranks.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.kill()
        for process in self.ranks.values():
            process.wait()


@contextlib.contextmanager
def processes(size: int, model: Path, logs: Path, *, fresh: bool = False, **settings: str) -> Iterator[Processes]:
    """A ring, started; its processes end with the block."""
    ring = Processes(size, model, logs, fresh=fresh, **settings)
    try:
        ring.start()
        yield ring
    finally:
        ring.close()
