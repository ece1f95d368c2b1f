"""What became of the promises: the definition, and each result through a real proxy before a scripted engine."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.admission import goals
from kvplane_api.wire import PromisesState, SidecarConfig, SloConfig
from kvplane_runtime.sidecar.promises import Promises, Result, judged
from tests.proxy.peers import Client, Script, UpstreamSocket, until
from tests.sidecar.test_admit import BUSY, DONE, STREAM, TOKEN, USAGE, Held, Stage, answer, answers, event, ids, staged

SLO = SloConfig(ttft_milliseconds=2000, tpot_milliseconds=50)
ERROR = event({"error": {"message": "busy", "code": 503}})
POLICIES = pytest.mark.parametrize("policy", ["Enforce", "Observe", "Off"])


def status(line: str) -> bytes:
    return f"HTTP/1.1 {line}\r\ncontent-length: 0\r\n\r\n".encode()


# The definition.


@given(
    first=st.floats(0, 4),
    rest=st.floats(0, 10),
    tokens=st.integers(1, 200),
    ttft=st.integers(1, 4000),
    tpot=st.integers(1, 200),
)
def test_a_streamed_answer_is_judged_as_benchmarks_judge(
    first: float, rest: float, tokens: int, ttft: int, tpot: int
) -> None:
    slo = SloConfig(ttft_milliseconds=ttft, tpot_milliseconds=tpot)
    result = judged(slo, let_through=0.0, first_token=first, total=first + rest, tokens=tokens)
    promised = goals.Goals(ttft_seconds=ttft / 1000, tpot_seconds=tpot / 1000)
    outcome = goals.Outcome(goals.End.COMPLETE, first_token=first, last_token=first + rest, tokens=tokens)
    assert (result is Result.MET) == promised.met(outcome)


@pytest.mark.parametrize(
    ("times", "tokens", "result"),
    [
        ({"first_token": 1.9, "total": 2.3}, 11, Result.MET),
        ({"first_token": 2.1, "total": 2.3}, 11, Result.TTFT_MISSED),
        ({"first_token": 1.9, "total": 2.5}, 11, Result.TPOT_MISSED),
        ({"first_token": 2.1, "total": 9.0}, 11, Result.TTFT_MISSED),
        ({"first_token": 1.9, "total": 9.0}, 1, Result.MET),
        ({"first_token": 1.9, "total": 2.3}, None, None),
        ({"first_token": None, "total": 2.4}, 11, Result.MET),
        ({"first_token": None, "total": 2.6}, 11, Result.TOTAL_MISSED),
        ({"first_token": None, "total": 2.1}, 0, Result.TOTAL_MISSED),
        ({"first_token": None, "total": 2.4, "let_through": 2.1}, 11, Result.TTFT_MISSED),
        ({"first_token": None, "total": 2.4}, None, None),
        ({"first_token": None, "total": 2.4, "let_through": 2.1}, None, Result.TTFT_MISSED),
    ],
)
def test_what_is_known_decides(times: dict[str, Any], tokens: int | None, result: Result | None) -> None:
    assert judged(SLO, **({"let_through": 0.0} | times), tokens=tokens) is result


def test_what_was_refused_or_failed_is_no_answer() -> None:
    promises = Promises()
    promises.results.update(dict(zip(Result, range(1, 7), strict=True)))
    assert promises.state() == PromisesState(kept_total=1, broken_total=4 + 5 + 6)


# Through the proxy.


class Streams:
    """An engine that sends a first token, and then two more and the end, each when it is told to."""

    def __init__(self, usage: bytes = USAGE) -> None:
        self.begin = asyncio.Event()
        self.finish = asyncio.Event()
        self._usage = usage

    async def __call__(self, socket: UpstreamSocket) -> None:
        while True:
            await socket.request()
            await self.begin.wait()
            await socket.send(STREAM + TOKEN)
            await self.finish.wait()
            await socket.send(TOKEN * 2 + self._usage + DONE)


def says(answered: bytes) -> Script:
    """An engine that answers one request on each connection, and closes it."""

    async def script(socket: UpstreamSocket) -> None:
        await socket.request()
        await socket.send(answered)

    return script


def results(stage: Stage) -> dict[Result, int]:
    return dict(stage.gate.promises.results)


def first_tokens(stage: Stage) -> tuple[float, float]:
    """How many are in the histogram, and the sum of their times."""
    histogram = stage.gate.promises.first_token_seconds.histogram()
    return histogram.count, histogram.sum


async def at_the_engine(stage: Stage, fields: dict[str, Any]) -> Client:
    """A request that the engine has and has not answered."""
    before = len(stage.upstream.requests)
    client = await stage.post({"prompt": ids(8), "max_tokens": 16} | fields)
    await until(lambda: len(stage.upstream.requests) == before + 1)
    return client


async def over(stage: Stage) -> None:
    await until(lambda: not stage.drain.in_flight)


@POLICIES
@pytest.mark.parametrize("usage", [USAGE, b""])
@pytest.mark.parametrize(
    ("first", "rest", "result"),
    [
        (1.9, 0.09, Result.MET),
        (2.1, 0.0, Result.TTFT_MISSED),
        (0.5, 0.11, Result.TPOT_MISSED),
        (2.1, 9.0, Result.TTFT_MISSED),
    ],
)
async def test_a_streamed_answer_by_its_times(
    *, policy: str, usage: bytes, first: float, rest: float, result: Result, tmp_path: Path
) -> None:
    """Three tokens, counted by the engine's usage or, without it, by their events."""
    engine = Streams(usage)
    async with staged(engine, tmp_path, policy=policy) as stage:
        stage.scraped()
        client = await at_the_engine(stage, {"stream": True})
        stage.clock.pass_seconds(first)
        engine.begin.set()
        await until(lambda: first_tokens(stage)[0] == 1)
        assert results(stage) == {}
        stage.clock.pass_seconds(rest)
        engine.finish.set()
        assert (await client.response()).status == 200
        await over(stage)
        assert results(stage) == {result: 1}
        assert first_tokens(stage) == (1, pytest.approx(first))


async def test_the_time_to_the_first_token_begins_before_our_queue(tmp_path: Path) -> None:
    engine = Streams()
    async with staged(engine, tmp_path, queue={"maxWaitSeconds": 10}) as stage:
        stage.scraped()
        long = {"prompt": ids(200), "max_tokens": 64, "stream": True}
        clients = [await at_the_engine(stage, long), await stage.post(long)]
        await until(lambda: stage.gate.admission.state(now=stage.clock()).queued == 1)
        stage.clock.pass_seconds(2.5)
        engine.begin.set()
        engine.finish.set()
        assert [(await client.response()).status for client in clients] == [200, 200]
        await over(stage)
        assert results(stage) == {Result.TTFT_MISSED: 2}
        assert first_tokens(stage) == (2, pytest.approx(5.0))


@POLICIES
@pytest.mark.parametrize(
    ("outputs", "tokens", "seconds", "result"),
    [
        (1, 4, 2.1, Result.MET),
        (1, 4, 2.2, Result.TOTAL_MISSED),
        (2, 8, 2.1, Result.MET),
        (2, 8, 2.2, Result.TOTAL_MISSED),
    ],
)
async def test_an_answer_that_is_not_streamed_by_its_whole(
    *, policy: str, outputs: int, tokens: int, seconds: float, result: Result, tmp_path: Path
) -> None:
    """2 s and three times 50 ms, however many outputs came beside each other."""
    engine = Held(answer(completion_tokens=tokens))
    async with staged(engine, tmp_path, policy=policy) as stage:
        stage.scraped()
        client = await at_the_engine(stage, {"n": outputs})
        stage.clock.pass_seconds(seconds)
        engine.go.set()
        assert (await client.response()).status == 200
        await over(stage)
        assert results(stage) == {result: 1}
        assert first_tokens(stage) == (0, 0.0)


async def test_one_that_was_let_through_too_late_has_missed_its_first_token(tmp_path: Path) -> None:
    engine = Held()
    async with staged(engine, tmp_path, queue={"maxWaitSeconds": 10}) as stage:
        stage.scraped()
        long = {"prompt": ids(200), "max_tokens": 64}
        clients = [await at_the_engine(stage, long), await stage.post(long)]
        await until(lambda: stage.gate.admission.state(now=stage.clock()).queued == 1)
        stage.clock.pass_seconds(2.5)
        engine.go.set()
        assert [(await client.response()).status for client in clients] == [200, 200]
        await over(stage)
        assert results(stage) == {Result.TOTAL_MISSED: 1, Result.TTFT_MISSED: 1}


async def test_an_answer_without_usage_that_is_not_streamed_is_not_judged(tmp_path: Path) -> None:
    body = json.dumps({"choices": [{"text": "x"}]}).encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    engine = Held(head + body)
    async with staged(engine, tmp_path) as stage:
        stage.scraped()
        engine.go.set()
        assert (await stage.ask({"prompt": ids(8), "max_tokens": 16})).status == 200
        await over(stage)
        assert results(stage) == {}


async def test_the_promise_is_that_of_the_moment(tmp_path: Path) -> None:
    engine = Held()
    async with staged(engine, tmp_path) as stage:
        stage.scraped()
        client = await at_the_engine(stage, {})
        stage.clock.pass_seconds(2.5)
        stage.config.current = SidecarConfig.model_validate({"servedName": "chat", "slo": {"ttftMilliseconds": 2500}})
        engine.go.set()
        await client.response()
        await over(stage)
        assert results(stage) == {Result.MET: 1}


async def test_refused_is_what_gets_429_and_not_what_never_fits(tmp_path: Path) -> None:
    async with staged(Held(), tmp_path, queue={"maxRequests": 0}) as stage:
        stage.scraped()
        assert (await stage.ask({"prompt": ids(400)})).status == 400
        assert results(stage) == {}
        await at_the_engine(stage, {"prompt": ids(200)})
        assert (await stage.ask({"prompt": ids(200), "max_tokens": 16})).status == 429
        assert results(stage) == {Result.REFUSED: 1}


@pytest.mark.parametrize("policy", ["Observe", "Off"])
async def test_the_engines_own_503_is_a_refusal(policy: str, tmp_path: Path) -> None:
    async with staged(says(BUSY), tmp_path, policy=policy) as stage:
        assert (await stage.ask({"prompt": ids(8), "max_tokens": 16})).status == 503
        await over(stage)
        assert results(stage) == {Result.REFUSED: 1}


@pytest.mark.parametrize(
    ("answered", "result"),
    [
        (b"", Result.FAILED),
        (status("500 Internal Server Error"), Result.FAILED),
        (STREAM, Result.FAILED),
        (STREAM + TOKEN, Result.FAILED),
        (STREAM + ERROR + DONE, Result.FAILED),
        (answer()[:-1], Result.FAILED),
        (status("429 Too Many Requests"), Result.REFUSED),
        (status("404 Not Found"), None),
        (STREAM + USAGE + DONE, Result.MET),
    ],
    ids=[
        "closes",
        "500",
        "cut",
        "cut in its tokens",
        "error event",
        "cut json",
        "429",
        "404",
        "no event of a known kind",
    ],
)
async def test_an_engines_answers(answered: bytes, result: Result | None, tmp_path: Path) -> None:
    async with staged(says(answered), tmp_path) as stage:
        stage.scraped()
        await at_the_engine(stage, {"stream": True})
        await over(stage)
        assert results(stage) == ({} if result is None else {result: 1})


async def test_without_an_engine_requests_fail_and_only_those_that_generate(tmp_path: Path) -> None:
    async with staged(answers, tmp_path) as stage:
        stage.engine.health.failed()
        for path, failed in (("/v1/embeddings", 0), ("/v1/completions", 1)):
            assert (await stage.ask({"prompt": ids(8)}, path)).status == 503
            assert stage.gate.promises.results[Result.FAILED] == failed


async def test_a_client_that_leaves_the_queue_when_its_time_is_over_was_late(tmp_path: Path) -> None:
    engine = Held()
    async with staged(engine, tmp_path, queue={"maxWaitSeconds": 10}) as stage:
        stage.scraped()
        long = {"prompt": ids(200), "max_tokens": 64}
        await at_the_engine(stage, long)
        clients = [await stage.post(long) for _ in range(2)]
        await until(lambda: stage.gate.admission.state(now=stage.clock()).queued == 2)
        clients[0].abort()
        await until(lambda: stage.gate.admission.state(now=stage.clock()).queued == 1)
        stage.clock.pass_seconds(2.5)
        clients[1].abort()
        await until(lambda: stage.gate.admission.state(now=stage.clock()).queued == 0)
        assert results(stage) == {Result.TTFT_MISSED: 1}
        engine.go.set()


async def test_a_client_that_leaves_in_time_is_not_judged(tmp_path: Path) -> None:
    engine = Streams()
    async with staged(engine, tmp_path) as stage:
        stage.scraped()
        client = await at_the_engine(stage, {"stream": True})
        engine.begin.set()
        await until(lambda: first_tokens(stage)[0] == 1)
        client.abort()
        await over(stage)
        assert results(stage) == {}
