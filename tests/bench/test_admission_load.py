"""The load generator, its gate and its client, against a stub of the engine's streamed completions."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from bench.admission.client import CompletionError, Progress, body, complete, counted
from bench.admission.gate import Gate
from bench.admission.goals import End, Goals
from bench.admission.load import LoadGenerator, Run
from bench.admission.policies.reservations import reserve_maximum
from bench.admission.policies.unlimited import Unlimited
from bench.admission.policies.vllm_caps import QueueCaps
from bench.admission.policy import Engine, Policy, Request, Ruling, Scrape, Verdict, View
from bench.admission.workload import Arrival

ENGINE = Engine(blocks=97, block_size=32, max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=2048)
GOALS = Goals(ttft_seconds=5.0, tpot_seconds=5.0)


class StubEngine:
    """Streams as many tokens as ``min_tokens`` says and one.

    ``stuck``: the last one never comes; ``cut``: the end of the stream does not; ``merged``: one event has two tokens;
    ``error``: the code of an event that the stream consists of.
    """

    def __init__(
        self,
        *,
        status: int = 200,
        stuck: bool = False,
        cut: bool = False,
        merged: bool = False,
        error: int | None = None,
    ) -> None:
        self.status, self.stuck, self.cut, self.merged, self.error = status, stuck, cut, merged, error
        self.bodies: list[dict[str, object]] = []
        self.most_at_once = self._at_once = 0
        self.aborted = 0

    async def completions(self, request: web.Request) -> web.StreamResponse:
        document = await request.json()
        self.bodies.append(document)
        if self.status != 200:
            return web.Response(status=self.status)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await answer.prepare(request)
            if self.error is not None:
                await answer.write(b'data: {"error": {"message": "busy", "code": %d}}\n\ndata: [DONE]\n\n' % self.error)
                return answer
            wanted = int(document["min_tokens"]) + 1
            for _ in range(wanted - (1 if self.stuck or self.merged else 0)):
                await answer.write(b'data: {"choices":[{"index":0,"text":"x"}]}\n\n')
            if self.stuck:
                await asyncio.Event().wait()
            if not self.cut:
                await answer.write(
                    b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":%d}}\n\n' % wanted
                )
                await answer.write(b"data: [DONE]\n\n")
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        finally:
            self._at_once -= 1
        return answer


@asynccontextmanager
async def _serving(engine: StubEngine) -> AsyncIterator[tuple[aiohttp.ClientSession, str]]:
    application = web.Application()
    application.router.add_post("/v1/completions", engine.completions)
    runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        async with aiohttp.ClientSession() as session:
            yield session, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def _no_metrics() -> Scrape | None:
    return None


def _arrivals(count: int, *, output: int = 3) -> list[Arrival]:
    return [Arrival(at=i / 1000, prompt_tokens=20, output_tokens=output, max_tokens=256) for i in range(count)]


async def _run(
    engine: StubEngine, arrivals: Sequence[Arrival], *, policy: Policy | None = None, goals: Goals = GOALS
) -> Run:
    async with _serving(engine) as (session, url):
        gate = Gate(policy, engine=ENGINE, read=_no_metrics) if policy else None
        return await LoadGenerator(session, url, model="demo", gate=gate).open_loop(arrivals, goals, salt="s")


async def test_every_request_is_sent_and_timed_to_its_last_token() -> None:
    engine = StubEngine()
    run = await _run(engine, _arrivals(20))
    assert [outcome.end for outcome in run.outcomes] == [End.COMPLETE] * 20
    for outcome in run.outcomes:
        assert outcome.tokens == 3
        assert outcome.first_token is not None
        assert outcome.last_token is not None
        assert 0 <= outcome.first_token <= outcome.last_token
    assert run.errors == ()


async def test_the_client_announces_a_ceiling_and_the_engine_ends_at_the_answers_length() -> None:
    engine = StubEngine()
    await _run(engine, _arrivals(1, output=7))
    (sent,) = engine.bodies
    assert (sent["max_tokens"], sent["min_tokens"], sent["logit_bias"]) == (256, 6, {"1": 100})
    prompt = sent["prompt"]
    assert isinstance(prompt, list)
    assert len(prompt) == 20


async def test_what_the_policy_refuses_is_not_sent() -> None:
    engine = StubEngine(stuck=True)
    run = await _run(
        engine, _arrivals(5), policy=QueueCaps(max_num_queued_reqs=2), goals=Goals(ttft_seconds=5.0, tpot_seconds=0.05)
    )
    assert [outcome.end for outcome in run.outcomes] == [End.UNFINISHED] * 2 + [End.REFUSED] * 3
    assert len(engine.bodies) == 2


async def test_what_is_held_goes_when_there_is_room() -> None:
    engine = StubEngine()
    arrivals = [Arrival(at=0.0, prompt_tokens=1000, output_tokens=3, max_tokens=1024) for _ in range(4)]
    run = await _run(engine, arrivals, policy=reserve_maximum(limit_seconds=60))
    assert [outcome.end for outcome in run.outcomes] == [End.COMPLETE] * 4
    assert engine.most_at_once == 1


async def test_what_is_held_too_long_is_refused() -> None:
    engine = StubEngine(stuck=True)
    arrivals = [Arrival(at=0.0, prompt_tokens=1000, output_tokens=3, max_tokens=1024) for _ in range(2)]
    run = await _run(
        engine, arrivals, policy=reserve_maximum(limit_seconds=0.01), goals=Goals(ttft_seconds=5.0, tpot_seconds=0.05)
    )
    assert sorted(outcome.end for outcome in run.outcomes) == [End.REFUSED, End.UNFINISHED]


@pytest.mark.parametrize("status", [429, 503])
async def test_the_engines_own_refusal_is_one(status: int) -> None:
    run = await _run(StubEngine(status=status), _arrivals(2), policy=Unlimited())
    assert [outcome.end for outcome in run.outcomes] == [End.REFUSED] * 2


async def test_a_refusal_may_be_an_event_of_a_stream_that_had_begun() -> None:
    run = await _run(StubEngine(error=503), _arrivals(2))
    assert [outcome.end for outcome in run.outcomes] == [End.REFUSED] * 2
    failed = await _run(StubEngine(error=500), _arrivals(1))
    assert (failed.outcomes[0].end, failed.errors) == (End.FAILED, ("CompletionError: busy",))


async def test_anything_else_is_a_failure_with_its_words() -> None:
    run = await _run(StubEngine(status=500), _arrivals(1))
    assert [outcome.end for outcome in run.outcomes] == [End.FAILED]
    assert run.errors[0].startswith("CompletionError: 500")


async def test_a_stream_that_ends_amid_the_answer_is_a_failure() -> None:
    run = await _run(StubEngine(cut=True), _arrivals(1))
    assert [outcome.end for outcome in run.outcomes] == [End.FAILED]


async def test_what_can_no_longer_be_in_time_is_aborted_at_the_end() -> None:
    engine = StubEngine(stuck=True)
    run = await _run(engine, _arrivals(3), goals=Goals(ttft_seconds=5.0, tpot_seconds=0.01))
    assert [outcome.end for outcome in run.outcomes] == [End.UNFINISHED] * 3
    assert all(outcome.tokens == 2 for outcome in run.outcomes)
    assert engine.aborted == 3


async def test_tokens_are_the_engines_count_and_not_the_events() -> None:
    run = await _run(StubEngine(merged=True), _arrivals(1, output=5))
    assert [(outcome.end, outcome.tokens) for outcome in run.outcomes] == [(End.COMPLETE, 5)]


async def test_an_answer_of_another_length_is_a_failure() -> None:
    engine = StubEngine()
    async with _serving(engine) as (session, url):
        progress = Progress()
        short = body(_arrivals(1, output=4)[0], model="demo", salt="s")
        with pytest.raises(CompletionError, match="after 4 of 5 tokens"):
            await complete(
                session,
                f"{url}/v1/completions",
                short,
                output_tokens=5,
                clock=asyncio.get_running_loop().time,
                progress=progress,
                on_tokens=lambda tokens: None,
            )


async def test_a_closed_loop_keeps_its_concurrency() -> None:
    engine = StubEngine()
    async with _serving(engine) as (session, url):
        run = await LoadGenerator(session, url, model="demo").closed_loop(_arrivals(12), concurrency=3, salt="s")
    assert [outcome.end for outcome in run.outcomes] == [End.COMPLETE] * 12
    assert engine.most_at_once <= 3


class Watching:
    """A policy that writes down what it is told."""

    name = "watching"
    scrape_seconds = 0.01
    progress_seconds = 0.01

    def __init__(self) -> None:
        self.said: list[str] = []
        self.scrapes: list[float] = []
        self.progress: dict[int, int] = {}

    def on_arrival(self, request: Request, view: View, now: float) -> Verdict:
        self.said.append("arrival")
        return Verdict.PASS

    def on_first_token(self, request: Request, view: View, now: float) -> None:
        self.said.append("first token")

    def on_progress(self, generated: Mapping[int, int], view: View, now: float) -> None:
        self.progress.update(generated)

    def on_finish(self, request: Request, output_tokens: int, view: View, now: float) -> None:
        self.said.append(f"finish {output_tokens}")

    def on_scrape(self, view: View, now: float) -> None:
        assert view.scrape is not None
        self.scrapes.append(view.scrape.taken_at)

    def on_tick(self, view: View, now: float) -> Sequence[Ruling]:
        return ()

    def next_tick_at(self, now: float) -> float | None:
        return None


async def test_a_policy_is_told_of_requests_tokens_and_scrapes() -> None:
    policy, reads = Watching(), iter(range(10_000))

    async def read() -> Scrape | None:
        number = next(reads)
        if number % 2:
            return None
        return Scrape(float(number), 0.0, running=0, waiting=0, preemptions=0, prompt_tokens=0, generation_tokens=0)

    engine = StubEngine(stuck=True)
    async with _serving(engine) as (session, url):
        gate = Gate(policy, engine=ENGINE, read=read)
        load = LoadGenerator(session, url, model="demo", gate=gate)
        await load.open_loop(_arrivals(1, output=9), Goals(ttft_seconds=5.0, tpot_seconds=0.05), salt="s")
    assert policy.said == ["arrival", "first token", "finish 8"]
    assert policy.progress == {0: 8}
    assert len(policy.scrapes) >= 2
    assert all(number % 2 == 0 for number in policy.scrapes)  # a failed scrape is no scrape


def test_prompts_differ_by_salt_and_nothing_else_does() -> None:
    arrival = Arrival(at=0.0, prompt_tokens=50, output_tokens=3, max_tokens=256)
    one, same, other = (json.loads(body(arrival, model="demo", salt=salt)) for salt in ("a", "a", "b"))
    assert one == same
    assert one["prompt"] != other["prompt"]
    assert len(one["prompt"]) == len(other["prompt"]) == 50
    assert {k: v for k, v in one.items() if k != "prompt"} == {k: v for k, v in other.items() if k != "prompt"}


@pytest.mark.parametrize(
    ("lines", "tokens"),
    [
        (b'data: {"usage":{"prompt_tokens":4,"completion_tokens":12,"total_tokens":16}}', 12),
        (b'data: {"choices":[],"usage": {"completion_tokens": 4}}\n\n', 4),
        (b'data: {"choices":[{"text":"x"}]}\n', None),
        (b"data: [DONE]\n", None),
        (b"", None),
    ],
)
def test_the_count_of_the_usage(lines: bytes, tokens: int | None) -> None:
    assert counted(lines) == tokens
