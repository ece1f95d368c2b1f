"""The real vLLM on CPU as a local process: started on loopback, waited for, and ended with all of its children.

    async with RealEngine(blocks=97, block_size=32, max_num_seqs=64) as engine:
        await session.post(f"{engine.url}/v1/completions", json={"model": engine.model, ...})

The model has four layers, 8 M random weights and float32 KV of 4 KiB per token unless told otherwise, so a step takes
milliseconds (some 0.3 per layer) and the KV cache is as small as the test wants it: ``blocks`` blocks are few enough to
run out of with a handful of requests, which is what makes a real engine thrash on two cores. It writes gibberish;
``ignore_eos`` and ``max_tokens`` say how much.
"""

import asyncio
import contextlib
import json
import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

import aiohttp

from bench.engine import environment
from bench.engine.model import StepTime
from bench.engine.plugin import kvplane_pace
from e2e.cluster.ports import free_ports
from e2e.cluster.progress import Progress

START_SECONDS: Final = 300.0
"""Longest wait for ``/health``; a start takes 15-60 s, and several times that on a busy machine."""
STOP_SECONDS: Final = 15.0
PLUGIN: Final = Path(kvplane_pace.__file__).resolve().parent
"""On vLLM's path where it is paced; it is a folder of its own, since vLLM would find the modules of this one too."""


class EngineStartError(Exception):
    """vLLM ended, or was not healthy in time; the message holds the end of its log."""


class RealEngine:
    """One ``vllm serve``, for the length of an ``async with``; it can be entered again after its end."""

    def __init__(
        self,
        *,
        blocks: int = 97,
        block_size: int = 32,
        max_num_seqs: int = 64,
        max_model_len: int = 2048,
        layers: int = 4,
        extra_args: Sequence[str] = (),
        extra_environment: Mapping[str, str] | None = None,
        pace: StepTime | None = None,
        log: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        """``blocks`` is vLLM's num_gpu_blocks: one of them is the null block, 96 of 97 hold KV. ``log``: a file to keep.

        ``pace``: how long each step is to last (``plugin/kvplane_pace.py``); None: as long as it takes.
        """
        self.blocks, self.block_size = blocks, block_size
        self.max_num_seqs, self.max_model_len = max_num_seqs, max_model_len
        self.model: Final = "demo"
        self._layers = layers
        self._extra_environment = dict(extra_environment or {})
        if pace:
            self._extra_environment |= environment_of(pace, path=self._extra_environment.get("PYTHONPATH"))
        self._extra_args, self._log, self._progress = tuple(extra_args), log, progress or Progress(quiet=True)
        self._process: asyncio.subprocess.Process | None = None
        self._output: IO[bytes] | None = None
        self._port = 0

    @property
    def url(self) -> str:
        """Base URL, without ``/v1``."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """Of the API server; the engine core is a child of it."""
        if self._process is None:
            raise RuntimeError("The engine has no process before `async with` and after it.")
        return self._process.pid

    async def __aenter__(self) -> Self:
        python, model = await asyncio.to_thread(partial(environment.prepare, layers=self._layers), self._progress)
        self._output = self._log.open("wb") if self._log else tempfile.TemporaryFile()  # noqa: SIM115 closed in _stop
        (self._port,) = free_ports(1)
        self._process = await asyncio.create_subprocess_exec(
            *(str(python.with_name("vllm")), "serve", str(model), "--served-model-name", self.model),
            *("--host", "127.0.0.1", "--port", str(self._port)),
            *("--dtype", "float32", "--enforce-eager", "--disable-uvicorn-access-log"),
            *("--num-gpu-blocks-override", str(self.blocks), "--block-size", str(self.block_size)),
            *("--max-num-seqs", str(self.max_num_seqs), "--max-model-len", str(self.max_model_len)),
            *self._extra_args,
            env={**environment.variables(python), **self._extra_environment},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=self._output,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # its children are ended with it, as one process group
        )
        try:
            with self._progress.step(f"vLLM with {self.blocks} blocks of {self.block_size}"):
                await self._healthy(self._process)
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        await self._stop()

    async def _healthy(self, process: asyncio.subprocess.Process) -> None:
        end = asyncio.get_running_loop().time() + START_SECONDS
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            while True:
                if process.returncode is not None:
                    raise EngineStartError(f"vLLM ended with status {process.returncode}:\n{self._log_end()}")
                try:
                    async with session.get(f"{self.url}/health") as answer:
                        if answer.status == 200:
                            return
                except (aiohttp.ClientError, TimeoutError):
                    pass  # not listening yet
                if asyncio.get_running_loop().time() > end:
                    raise EngineStartError(f"vLLM was not healthy within {START_SECONDS:.0f} s:\n{self._log_end()}")
                await asyncio.sleep(0.25)

    async def _stop(self) -> None:
        if self._process is not None:
            group = self._process.pid
            try:
                if self._process.returncode is None:
                    self._process.send_signal(signal.SIGTERM)
                    await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
            except TimeoutError:
                pass  # the group is killed below
            finally:
                with contextlib.suppress(ProcessLookupError):  # nobody is left
                    os.killpg(group, signal.SIGKILL)
                await self._process.wait()
                self._process = None
        if self._output is not None:
            self._output.close()
            self._output = None

    def _log_end(self) -> str:
        assert self._output is not None
        if self._log is not None:
            text = self._log.read_bytes()
        else:
            text = os.pread(self._output.fileno(), 1 << 20, max(0, os.fstat(self._output.fileno()).st_size - 4000))
        return text[-4000:].decode(errors="replace")


def environment_of(pace: StepTime, *, path: str | None) -> dict[str, str]:
    """The variables by which vLLM keeps a pace; ``path``: the PYTHONPATH that is wanted besides.

    Raises:
        ValueError: the pace has a price by context.
    """
    given = asdict(pace)
    if given.pop("per_context_token"):
        raise ValueError("A pace by context is not told to the plugin; give a StepTime without it.")
    where = str(PLUGIN) if path is None else f"{PLUGIN}{os.pathsep}{path}"
    return {kvplane_pace.VARIABLE: json.dumps(given), "PYTHONPATH": where}
