"""The processes of the benchmark: the engine, our proxy, Go's proxy, and the loads that are run against each."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.operator.process import Process
from bench.proxy.figures import Load, Spread
from e2e.cluster import cache, toolchain
from e2e.cluster.errors import BuildError
from e2e.cluster.progress import Progress

REPOSITORY = Path(__file__).resolve().parents[2]
GO_MODULE = Path(__file__).resolve().parent / "go"
_START_SECONDS = 10.0


def build(progress: Progress) -> Path:
    """The Go program, compiled where its sources changed (Go's own build cache tells).

    Raises RequirementError where there is no Go toolchain, BuildError where it does not compile.
    """
    go = toolchain.find(toolchain.required_version((GO_MODULE / "go.mod").read_text()), progress)
    program = cache.binaries() / "bench-proxy"
    program.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [go.go, "build", "-trimpath", "-o", program, "."],
        cwd=GO_MODULE,
        env=go.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BuildError(f"go could not build {GO_MODULE}:\n{done.stderr}")
    return program


class Contestant:
    """Something that a load can be sent to."""

    def __init__(self, name: str, command: Callable[[int], list[str]], log: Path) -> None:
        """``command`` makes the command line for a port."""
        self.name = name
        self.port = _free_port()
        self._process = Process(command(self.port), {"PYTHONPATH": _python_path()}, log=log)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns when it accepts connections; raises RuntimeError if it ended, TimeoutError if it never does."""
        self._process.start()
        give_up = time.monotonic() + _START_SECONDS
        while time.monotonic() < give_up:
            self._process.check()
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise TimeoutError(f"{self.name} accepts no connections on port {self.port} after {_START_SECONDS:g} s.")

    def stop(self) -> None:
        self._process.kill()

    def cpu_seconds(self) -> float:
        return self._process.cpu_seconds()


def engine(program: Path, folder: Path) -> Contestant:
    """What stands behind the proxies; measured by itself it is the direct run."""
    return Contestant("direct", lambda port: [str(program), "engine", f"127.0.0.1:{port}"], folder / "engine.log")


def kvplane(behind: Contestant, folder: Path) -> Contestant:
    """The proxy of the sidecar."""
    return Contestant(
        "kvplane",
        lambda port: [sys.executable, "-m", "bench.proxy.ours", str(port), str(behind.port)],
        folder / "kvplane.log",
    )


def reverse_proxy(program: Path, behind: Contestant, folder: Path) -> Contestant:
    """The peer."""
    return Contestant(
        "httputil.ReverseProxy",
        lambda port: [str(program), "reverse-proxy", f"127.0.0.1:{port}", behind.url],
        folder / "reverse-proxy.log",
    )


def run_load(program: Path, contestant: Contestant, *arguments: str | int) -> Load:
    """One load (see main.go) against one contestant, whose CPU time is taken at the edges of the load's window.

    Raises RuntimeError if the load failed, or if any request did: figures of a run with errors say nothing.
    """
    kind, *numbers = map(str, arguments)
    with subprocess.Popen([program, kind, contestant.url, *numbers], stdout=subprocess.PIPE, text=True) as load:
        assert load.stdout is not None
        edges: list[float] = []
        document: Any = None
        for line in load.stdout:
            document = json.loads(line)
            if document in ("begin", "end"):
                edges.append(contestant.cpu_seconds())
    if load.returncode or len(edges) != 2:
        raise RuntimeError(f"The load {kind} against {contestant.name} ended with status {load.returncode}.")
    if document["errors"]:
        raise RuntimeError(f"{document['errors']} requests of the load {kind} against {contestant.name} failed.")
    return Load(
        cpu_seconds=edges[1] - edges[0],
        seconds=document["seconds"],
        requests=document["requests"],
        chunks=document["chunks"],
        first_byte=_spread(document["first_byte"]),
        chunk=_spread(document["chunk"]),
    )


def _spread(document: dict[str, Any]) -> Spread:
    return Spread(
        count=document["count"],
        median_ms=document["median_us"] / 1000,
        p99_ms=document["p99_us"] / 1000,
        max_ms=document["max_us"] / 1000,
    )


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _python_path() -> str:
    return os.pathsep.join(str(REPOSITORY / folder) for folder in ("operator", "runtime", "."))
