"""The processes of the benchmark: the engine, our sidecar, its proxy alone, Go's proxy, and the loads that each is given."""

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
from bench.proxy.sidecar import Sidecar
from e2e.cluster import cache, toolchain
from e2e.cluster.errors import BuildError
from e2e.cluster.ports import free_ports
from e2e.cluster.progress import Progress

REPOSITORY = Path(__file__).resolve().parents[2]
GO_MODULE = Path(__file__).resolve().parent / "go"
RECORDED = REPOSITORY / "tests/sidecar/expositions/vllm-0.32.0.recorded.txt"
"""The metrics of a running vLLM, after which the engine makes its own: as many lines for the sidecar to read."""
_START_SECONDS = 30.0


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

    def __init__(
        self,
        name: str,
        command: Callable[[int], list[str]],
        log: Path,
        *,
        ready: Callable[[], bool] = lambda: True,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """``command`` makes the command line for a port; ``ready``: whether what listens there may be measured yet;
        ``check`` raises RuntimeError where a load that has ended is not to be counted.
        """
        self.name = name
        self.check = check
        (self.port,) = free_ports(1)
        self._ready = ready
        self._process = Process(command(self.port), {"PYTHONPATH": _python_path()}, log=log)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns when it may be measured; raises RuntimeError if it ended, TimeoutError if it takes too long."""
        self._process.start()
        give_up = time.monotonic() + _START_SECONDS
        while time.monotonic() < give_up:
            self._process.check()
            if self._listens() and self._ready():
                return
            time.sleep(0.05)
        raise TimeoutError(f"{self.name} serves nobody on port {self.port} after {_START_SECONDS:g} s.")

    def stop(self) -> None:
        self._process.kill()

    def cpu_seconds(self) -> float:
        return self._process.cpu_seconds()

    def _listens(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0


def engine(program: Path, folder: Path) -> Contestant:
    """What stands behind the proxies; measured by itself it is the direct run."""
    return Contestant(
        "direct",
        lambda port: [str(program), "engine", f"127.0.0.1:{port}", str(RECORDED)],
        folder / "engine.log",
    )


def kvplane(sidecar: Sidecar, folder: Path) -> Contestant:
    """The sidecar."""
    return Contestant("kvplane", sidecar.command, folder / "kvplane.log", ready=sidecar.ready, check=sidecar.check)


def proxy_alone(behind: Contestant, folder: Path) -> Contestant:
    """The proxy of the sidecar, with nothing that decides."""
    return Contestant(
        "kvplane without admission",
        lambda port: [sys.executable, "-m", "bench.proxy.alone", str(port), str(behind.port)],
        folder / "proxy-alone.log",
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

    Raises RuntimeError if the load failed, or if any request did, or was refused: figures of a run with errors say nothing.
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
    contestant.check()
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


def _python_path() -> str:
    return os.pathsep.join(str(REPOSITORY / folder) for folder in ("operator", "runtime", "."))
