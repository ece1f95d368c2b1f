"""The engines, and one run of one contestant on its engine: traffic, counters before and after, the log in between."""

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import aiohttp

from bench.admission import counters, workload
from bench.admission.contestants import Contestant, Engines
from bench.admission.gate import Gate
from bench.admission.goals import Goals, summary
from bench.admission.load import LoadGenerator, Run
from bench.admission.plan import WARM_UP_SEED, RunKey
from bench.admission.policies.unlimited import Unlimited
from bench.admission.policy import Engine, Policy, Scrape
from bench.admission.records import Machine, RunRecord
from bench.admission.sidecar import SidecarProcess, config
from bench.admission.workload import Arrival
from bench.engine.model import StepTime
from bench.engine.real import RealEngine
from e2e.cluster.progress import Progress

FACTS: Final = Engine(blocks=97, block_size=32, max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=2048)
"""Of every engine here; 96 blocks hold KV."""
LAYERS: Final = 2
"""Of its model, which is computed well within the pace."""
PACE: Final = StepTime(base=0.010, per_prefill_token=0.00012, per_decode=0.0001, per_context_token=0.0)
"""About that of a model of 30 B parameters on one large accelerator: 100 tokens a second alone, 8,300 of a prompt. The frontend
has then a thousand tokens a second to send, for a third of a processor."""
IDLE_SECONDS: Final = 30.0
"""Longest wait for an engine to end what was aborted."""
WARM_UP_CONCURRENCY: Final = 4


@dataclass
class _Running:
    """An engine that is up."""

    engine: RealEngine
    log: Path
    sidecar: SidecarProcess | None = None
    mix: str | None = None
    """What the sidecar was started for."""
    closing: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)
    """Ends the sidecar."""


class Arena:
    """Engines by kind, started when they are first wanted and ended together."""

    def __init__(self, *, session: aiohttp.ClientSession, folder: Path, progress: Progress, warm_up: int) -> None:
        self._session = session
        self._folder = folder
        self._progress = progress
        self._warm_up = warm_up
        self._engines: dict[Engines, _Running] = {}
        self._stack = contextlib.AsyncExitStack()
        self.cap: int | None = None
        """Value of ``--max-num-queued-reqs`` of the capped engine; to be set before that is first wanted."""

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator["Arena"]:
        async with self._stack:
            yield self

    async def unloaded(self, arrivals: Sequence[Arrival], *, salt: str) -> Run:
        """One request at a time on an idle engine. Raises ValueError too where the engine does not keep its pace."""
        running = await self._engine(Engines.PLAIN)
        load = LoadGenerator(self._session, running.engine.url, model=running.engine.model)
        run = _sound(await load.closed_loop(arrivals, concurrency=1, salt=salt))
        usual = statistics.median(outcome.tpot for outcome in run.outcomes if outcome.tpot is not None)
        if usual < PACE.base:
            raise ValueError(
                f"The engine gave a token each {1000 * usual:.1f} ms and its pace is {1000 * PACE.base:.0f} ms: vLLM has not "
                f"loaded the plugin kvplane_pace; {running.log} says why."
            )
        return run

    async def probe(self, arrivals: Sequence[Arrival], goals: Goals, *, salt: str) -> tuple[Run, Machine]:
        """Without admission."""
        running = await self._engine(Engines.PLAIN)
        run, _, machine = await self._measured(running, Unlimited(), arrivals, goals, salt=salt)
        return run, machine

    async def run(
        self, key: RunKey, contestant: Contestant, arrivals: Sequence[Arrival], goals: Goals, *, rate: float
    ) -> RunRecord:
        """One run, measured.

        Raises:
            ValueError: a request failed for no reason that a policy has.
        """
        running = await self._engine(contestant.engine)
        if contestant.engine is Engines.SIDECAR:
            await self._with_sidecar(running, key.mix, goals)
        policy = contestant.policy(goals) if contestant.policy else None
        run, work, machine = await self._measured(running, policy, arrivals, goals, salt=str(key))
        return RunRecord(
            key=key,
            rate=rate,
            summary=summary(run.outcomes, goals),
            preemptions=work.preemptions,
            computed_tokens=work.computed_tokens,
            recomputed_tokens=work.recomputed_tokens,
            machine=machine,
            met="".join("01"[goals.met(outcome)] for outcome in run.outcomes),
            at=time.time(),
        )

    async def _measured(
        self, running: _Running, policy: Policy | None, arrivals: Sequence[Arrival], goals: Goals, *, salt: str
    ) -> tuple[Run, counters.Work, Machine]:
        """Traffic on an idle engine, until that is idle again."""
        load, loop = self._load(running, policy), asyncio.get_running_loop()
        before, position, began = await self._idle(running), running.log.stat().st_size, loop.time()
        run = _sound(await load.open_loop(arrivals, goals, salt=salt))
        seconds, after = loop.time() - began, await self._idle(running)
        with running.log.open("rb") as log:
            log.seek(position)
            work = counters.work(before, after, log.read())
        return run, work, Machine(run.late_seconds, work.overrun_seconds / seconds)

    def _load(self, running: _Running, policy: Policy | None) -> LoadGenerator:
        url = running.sidecar.url if running.sidecar else running.engine.url

        async def read() -> Scrape | None:
            try:
                return (await self._read(running)).scrape
            except (aiohttp.ClientError, TimeoutError):
                return None

        gate = Gate(policy, engine=FACTS, read=read) if policy else None
        return LoadGenerator(self._session, url, model=running.engine.model, gate=gate)

    async def _engine(self, kind: Engines) -> _Running:
        if kind not in self._engines:
            cap = () if kind is not Engines.CAPPED else ("--max-num-queued-reqs", str(self.cap))
            log = self._folder / f"engine-{kind.value}.log"
            engine = RealEngine(
                blocks=FACTS.blocks,
                block_size=FACTS.block_size,
                max_num_seqs=FACTS.max_num_seqs,
                max_model_len=FACTS.max_model_len,
                layers=LAYERS,
                pace=PACE,
                extra_args=(
                    *("--max-num-batched-tokens", str(FACTS.max_num_batched_tokens)),
                    *counters.ENGINE_ARGS,
                    *cap,
                ),
                log=log,
                progress=self._progress,
            )
            await self._stack.enter_async_context(engine)
            running = self._engines[kind] = _Running(engine, log)
            await self._stack.enter_async_context(running.closing)
            await self._first_steps(running)
        return self._engines[kind]

    async def _first_steps(self, running: _Running) -> None:
        """The first requests of an engine's life are slow, whoever sends them."""
        load = LoadGenerator(self._session, running.engine.url, model=running.engine.model)
        await load.closed_loop(
            workload.one_by_one("mixed", count=12, seed=0), concurrency=WARM_UP_CONCURRENCY, salt=f"first {id(running)}"
        )

    async def _with_sidecar(self, running: _Running, mix: str, goals: Goals) -> None:
        """A sidecar for this mix, which has seen some of its requests; it stays until another mix comes."""
        if running.mix == mix:
            return
        await running.closing.aclose()
        running.sidecar = await running.closing.enter_async_context(
            SidecarProcess(
                config(
                    goals,
                    model=running.engine.model,
                    max_batched_tokens=FACTS.max_num_batched_tokens,
                    max_sequences=FACTS.max_num_seqs,
                ),
                engine_port=int(running.engine.url.rpartition(":")[2]),
                log=self._folder / "sidecar.log",
            )
        )
        running.mix = mix
        with self._progress.step(f"{mix}: {self._warm_up} requests for the sidecar to learn from"):
            load = LoadGenerator(self._session, running.sidecar.url, model=running.engine.model)
            arrivals = workload.one_by_one(mix, count=self._warm_up, seed=WARM_UP_SEED)
            await load.closed_loop(arrivals, concurrency=WARM_UP_CONCURRENCY, salt=f"warm up {mix}")

    async def _idle(self, running: _Running) -> counters.Counters:
        """Waits until the engine has nothing to do; its counters then."""
        loop = asyncio.get_running_loop()
        end = loop.time() + IDLE_SECONDS
        while True:
            read = await self._read(running)
            if read.scrape.running == read.scrape.waiting == 0:
                await asyncio.sleep(0.2)  # for the last lines of its log
                return await self._read(running)
            if loop.time() > end:
                raise RuntimeError(f"The engine still has requests {IDLE_SECONDS:.0f} s after the last was aborted.")
            await asyncio.sleep(0.1)

    async def _read(self, running: _Running) -> counters.Counters:
        return await counters.read(self._session, running.engine.url, now=asyncio.get_running_loop().time())


def _sound(run: Run) -> Run:
    """The run itself; raises ValueError where a request failed for no reason that a policy has."""
    if run.errors:
        raise ValueError(f"Requests failed, the engine or the sidecar is at fault: {'; '.join(run.errors)}")
    return run
