"""A whole ring on this machine, for a trial: ``kvplane-ring local --ranks 4 --model PATH``.

Starts one process per rank on loopback, each with the environment that a pod would have, shows what they say, and starts a
rank again that has ended, as the kubelet would: ``kill -9`` any of them and watch the answer go on. All of them end with
this process, however it ends.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

from kvplane_api.capacity import RING_KV_PERCENT
from kvplane_api.names import STRATEGY_RING

_LOOPBACK: Final = "127.0.0.1"
_POLL_SECONDS: Final = 0.2
_BACK_OFF_SECONDS: Final = (0.5, 2.0, 5.0, 15.0)
_STEADY_SECONDS: Final = 30.0
"""A rank that ran for so long is started again at once."""
_STOP_SECONDS: Final = 10.0
_WRONG: Final = 2
"""Exit status of a rank that would end the same way again."""


@dataclass(slots=True)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    started: float
    failures: int = 0
    again_at: float | None = None
    """When it is started again; None while it runs."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What is tried."""

    ranks: int
    model: Path
    port: int
    settings: Mapping[str, str] = field(default_factory=dict)
    """Further ``KVPLANE_RING_*``, for all ranks; which rank it is, of what, and its ports are not theirs to say."""


def environment(
    trial: Trial, rank: int, *, ports: Sequence[int], base: Mapping[str, str], cores: int
) -> dict[str, str]:
    """What one rank is told. ``ports``: of the control connections, of the store, and one for each worker."""
    control, store, *workers = ports
    threads = max(1, cores // trial.ranks)
    gpu = trial.settings.get("KVPLANE_RING_DEVICE") == "cuda"
    share = str(max(1, RING_KV_PERCENT // trial.ranks))
    return {
        **base,
        "OMP_NUM_THREADS": str(threads),
        "KVPLANE_RING_THREADS": str(threads),
        **({} if gpu else {"KVPLANE_RING_KV_PERCENT": share}),  # on CPUs they share one memory
        "KVPLANE_RING_DRAIN_SECONDS": "5",
        **trial.settings,
        "WORLD_SIZE": str(trial.ranks),
        "PROMPT_SPLIT_STRATEGY": STRATEGY_RING,
        "POD_IP": _LOOPBACK,
        "POD_UID": f"local-{rank}",
        "KVPLANE_RING_ORDINAL": str(rank),
        "KVPLANE_RING_LEADER": _LOOPBACK,
        "KVPLANE_RING_MODEL": str(trial.model),
        "KVPLANE_RING_PORT": str(trial.port),
        "KVPLANE_RING_WORKER_PORT": str((trial.port, *workers)[rank]),
        "KVPLANE_RING_CONTROL_PORT": str(control),
        "KVPLANE_RING_STORE_PORT": str(store),
        "KVPLANE_RING_PARENT": str(os.getpid()),
        **({"CUDA_VISIBLE_DEVICES": _gpu(rank, base.get("CUDA_VISIBLE_DEVICES"))} if gpu else {}),
    }


def _gpu(rank: int, visible: str | None) -> str:
    """The GPU of one rank, of those that are ``visible`` (None: all); none where there are fewer, which the rank will say."""
    if visible is None:
        return str(rank)
    return dict(enumerate(visible.split(","))).get(rank, "")


class Local:
    """The processes of a trial. To be used on the main thread: its end is what ends them."""

    def __init__(self, trial: Trial, *, out: IO[str]) -> None:
        self._trial = trial
        self._out = out
        self._ports = _free_ports(1 + trial.ranks)
        self._ranks: list[_Rank] = []
        self._stopping = False

    def run(self) -> int:
        """Until SIGINT or SIGTERM, or until a rank says that it was told wrongly; the exit status."""
        # Before the first rank: who is told to end meanwhile ends those that there are.
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, self._stop)
        ready = False
        status = 0
        try:
            for number in range(self._trial.ranks):
                self._ranks.append(self._start(number))
            self._say(f"Starting {self._trial.ranks} ranks of {self._trial.model.name}.")
            while not self._stopping and not status:
                time.sleep(_POLL_SECONDS)
                status = self._look_after()
                if not ready and self._formed():
                    ready = True
                    self._say(self._ready())
        finally:
            self._end()
        return status

    def _start(self, number: int) -> _Rank:
        told = environment(self._trial, number, ports=self._ports, base=os.environ, cores=len(os.sched_getaffinity(0)))
        process = subprocess.Popen(
            [sys.executable, "-m", "kvplane_runtime.ring", "serve"],
            env=told,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # an interrupt of the terminal is this process's to pass on
        )
        threading.Thread(target=self._pass_on, args=(process,), daemon=True).start()
        return _Rank(number, process, time.monotonic())

    def _pass_on(self, process: "subprocess.Popen[bytes]") -> None:
        if process.stdout is not None:
            for line in process.stdout:
                self._say(line.decode(errors="replace").rstrip())

    def _look_after(self) -> int:
        """Starts ranks again that have ended; not 0 where that is of no use."""
        now = time.monotonic()
        for at, rank in enumerate(self._ranks):
            if rank.again_at is not None and now >= rank.again_at:
                again = self._start(rank.number)
                again.failures = rank.failures
                self._ranks[at] = again
            elif rank.again_at is None and (code := rank.process.poll()) is not None:
                if code == _WRONG:
                    return code
                rank.failures = 0 if now - rank.started > _STEADY_SECONDS else rank.failures + 1
                pause = _BACK_OFF_SECONDS[min(rank.failures, len(_BACK_OFF_SECONDS) - 1)]
                rank.again_at = now + pause
                self._say(f"Rank {rank.number} has ended ({_ending(code)}); it is started again in {pause:g} s.")
        return 0

    def _formed(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{_LOOPBACK}:{self._trial.port}/health", timeout=1.0) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def _ready(self) -> str:
        pids = " ".join(f"{rank.number}:{rank.process.pid}" for rank in self._ranks)
        return (
            f"The ring of {self._trial.ranks} is formed (rank:pid {pids}). Try:\n"
            f"  curl http://{_LOOPBACK}:{self._trial.port}/v1/completions -H 'content-type: application/json' \\\n"
            f'    -d \'{{"model": "{self._trial.model.name}", "prompt": "Once upon a time", "stream": true}}\''
        )

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _end(self) -> None:
        self._say("Stopping.")
        for rank in self._ranks:
            if rank.process.poll() is None:
                rank.process.terminate()
        until = time.monotonic() + _STOP_SECONDS
        for rank in self._ranks:
            try:
                rank.process.wait(timeout=max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                rank.process.kill()
                rank.process.wait()

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # who read it has gone; the ranks are still to be ended
            print(text, file=self._out, flush=True)


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"status {code}"


def _free_ports(count: int) -> tuple[int, ...]:
    sockets = [socket.create_server((_LOOPBACK, 0)) for _ in range(count)]
    try:
        return tuple(listening.getsockname()[1] for listening in sockets)
    finally:
        for listening in sockets:
            listening.close()
