"""Our sidecar as the process that it is in a pod, in front of one engine on this machine."""

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import aiohttp

from bench.admission.goals import Goals
from e2e.cluster.ports import free_ports
from kvplane_api.wire import EngineConfig, SidecarConfig, SloConfig

START_SECONDS: Final = 30.0
STOP_SECONDS: Final = 10.0
REPOSITORY: Final = Path(__file__).resolve().parents[2]


def config(goals: Goals, *, model: str, max_batched_tokens: int, max_sequences: int) -> SidecarConfig:
    """What the operator would render for a service with these goals, and everything else by default.

    Whole milliseconds, rounded down: the sidecar is never promised more time than the requests are judged by.
    """
    return SidecarConfig(
        served_name=model,
        slo=SloConfig(
            ttft_milliseconds=max(1, int(1000 * goals.ttft_seconds)),
            tpot_milliseconds=max(1, int(1000 * goals.tpot_seconds)),
        ),
        engine=EngineConfig(max_batched_tokens=max_batched_tokens, max_sequences=max_sequences),
    )


class SidecarProcess:
    """One ``kvplane-sidecar`` for the length of an ``async with``."""

    def __init__(self, config_: SidecarConfig, *, engine_port: int, log: Path) -> None:
        self._config, self._engine_port, self._log = config_, engine_port, log
        self._port, self._admin_port = free_ports(2)
        self._folder = tempfile.TemporaryDirectory(prefix="kvplane-bench-")
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """Where clients send requests, without ``/v1``."""
        return f"http://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        file = Path(self._folder.name) / "sidecar.json"
        file.write_text(self._config.model_dump_json(by_alias=True))
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "kvplane_runtime.sidecar", "--config", str(file), "--pod", "bench"),
                *("--host", "127.0.0.1", "--port", str(self._port), "--admin-port", str(self._admin_port)),
                *("--engine-port", str(self._engine_port)),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(str(REPOSITORY / p) for p in ("operator", "runtime"))},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            await self._ready(self._process)
        except BaseException:
            await self._stop(self._process)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        assert self._process is not None
        await self._stop(self._process)

    async def state(self) -> dict[str, object]:
        """Its ``/state``."""
        async with aiohttp.ClientSession() as session, session.get(f"{self._admin_url}/state") as answer:
            document = json.loads(await answer.text())
        assert isinstance(document, dict)
        return document

    @property
    def _admin_url(self) -> str:
        return f"http://127.0.0.1:{self._admin_port}"

    async def _ready(self, process: asyncio.subprocess.Process) -> None:
        end = asyncio.get_running_loop().time() + START_SECONDS
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            while asyncio.get_running_loop().time() < end:
                if process.returncode is not None:
                    raise RuntimeError(f"The sidecar ended with status {process.returncode}; see {self._log}.")
                try:
                    async with session.get(f"{self._admin_url}/ready") as answer:
                        if answer.status == 200:
                            return
                except aiohttp.ClientError:
                    pass  # not listening yet
                await asyncio.sleep(0.1)
        raise RuntimeError(f"The sidecar was not ready within {START_SECONDS:.0f} s; see {self._log}.")

    async def _stop(self, process: asyncio.subprocess.Process) -> None:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), STOP_SECONDS)
            except TimeoutError:
                process.kill()
                await process.wait()
        self._folder.cleanup()
