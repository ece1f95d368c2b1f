"""The simulated engine over HTTP: what clients, scrapers and subscribers of a real vLLM expect, they find."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import zmq
import zmq.asyncio

from bench.engine.model import EngineConfig, StepTime
from bench.engine.server import SimulatedServer
from kvplane_runtime.sidecar.kv_events import decode
from kvplane_runtime.sidecar.signals import missing_signals, normalise
from kvplane_runtime.signals.ledger import BlocksRemoved, BlocksStored

CONFIG = EngineConfig(num_gpu_blocks=17, block_size=4, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=60)
FAST = StepTime(base=0.0005, per_prefill_token=0.0, per_decode=0.0, per_context_token=0.0)


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[SimulatedServer]:
    async with SimulatedServer(config=CONFIG, step_time=FAST) as server:
        yield server


@pytest_asyncio.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as client:
        yield client


def chunks(text: str) -> list[Any]:
    """The JSON of a stream's events; its end is checked."""
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


async def test_a_completion_tells_its_usage_and_why_it_ended(
    engine: SimulatedServer, session: aiohttp.ClientSession
) -> None:
    body = {"model": "demo", "prompt": [7] * 10, "max_tokens": 5, "ignore_eos": True}
    async with session.post(f"{engine.url}/v1/completions", json=body) as answer:
        document = await answer.json()
    assert document["usage"] == {"prompt_tokens": 10, "total_tokens": 15, "completion_tokens": 5}
    assert [choice["finish_reason"] for choice in document["choices"]] == ["length"]
    body = {"prompt": "eight by", "max_tokens": 9, "min_tokens": 3}
    async with session.post(f"{engine.url}/v1/completions", json=body) as answer:
        document = await answer.json()
    assert document["usage"]["prompt_tokens"] == 2
    assert document["usage"]["completion_tokens"] == 4, "the end-of-text token is one more"
    assert document["choices"][0]["finish_reason"] == "stop"


async def test_a_stream_has_one_event_per_token_and_then_the_usage(
    engine: SimulatedServer, session: aiohttp.ClientSession
) -> None:
    body = {"prompt": [7] * 10, "max_tokens": 3, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True}}  # fmt: skip
    async with session.post(f"{engine.url}/v1/completions", json=body) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        *tokens, usage = chunks(await answer.text())
    assert [token["choices"][0]["text"] for token in tokens] == [" token"] * 3
    assert [token["usage"]["completion_tokens"] for token in tokens] == [1, 2, 3]
    assert [token["choices"][0]["finish_reason"] for token in tokens] == [None, None, "length"]
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 3)


async def test_a_chat_streams_its_role_and_every_choice(
    engine: SimulatedServer, session: aiohttp.ClientSession
) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, "ignore_eos": True,
            "n": 2, "stream": True}  # fmt: skip
    async with session.post(f"{engine.url}/v1/chat/completions", json=body) as answer:
        events = chunks(await answer.text())
    deltas = [(event["choices"][0]["index"], event["choices"][0]["delta"]) for event in events]
    assert [index for index, delta in deltas if delta.get("role") == "assistant"] == [0, 1]
    assert sorted(index for index, delta in deltas if delta.get("content") == " token") == [0, 0, 1, 1]
    body |= {"stream": False}
    async with session.post(f"{engine.url}/v1/chat/completions", json=body) as answer:
        document = await answer.json()
    assert [choice["message"]["content"] for choice in document["choices"]] == [" token token"] * 2
    assert document["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "not JSON"),
        (b"[]", 400, "JSON object"),
        (b'{"prompt": [[1], [2]]}', 400, "list of token ids"),
        (b'{"prompt": "hello", "max_tokens": 0}', 400, "max_tokens must be a whole number of at least 1, got 0"),
        (b'{"prompt": "hello", "n": "two"}', 400, 'n must be a whole number of at least 1, got "two"'),
        (b'{"prompt": "hello", "model": "other"}', 404, "`other` does not exist"),
        (json.dumps({"prompt": [1] * 60}).encode(), 400, "maximum context length is 60 tokens"),
    ],
)
async def test_what_cannot_be_served_is_answered_in_openai_s_form(
    engine: SimulatedServer, session: aiohttp.ClientSession, body: bytes, status: int, message: str
) -> None:
    async with session.post(f"{engine.url}/v1/completions", data=body) as answer:
        assert answer.status == status
        error = (await answer.json())["error"]
    assert message in error["message"]
    assert error["code"] == status
    async with session.post(f"{engine.url}/v1/chat/completions", json={"messages": []}) as answer:
        assert answer.status == 400


async def test_what_it_says_of_itself(engine: SimulatedServer, session: aiohttp.ClientSession) -> None:
    async with session.get(f"{engine.url}/health") as answer:
        assert answer.status == 200
    async with session.get(f"{engine.url}/version") as answer:
        assert await answer.json() == {"version": "0.32.0"}
    async with session.get(f"{engine.url}/v1/models") as answer:
        (model,) = (await answer.json())["data"]
    assert (model["id"], model["max_model_len"]) == ("demo", 60)


async def test_the_sidecar_reads_its_metrics_under_overload(
    engine: SimulatedServer, session: aiohttp.ClientSession
) -> None:
    async def complete() -> None:
        body = {"prompt": [7] * 10, "max_tokens": 30, "ignore_eos": True}
        async with session.post(f"{engine.url}/v1/completions", json=body) as answer:
            assert answer.status == 200
            await answer.read()

    await asyncio.gather(*(complete() for _ in range(6)))
    async with session.get(f"{engine.url}/metrics") as answer:
        text = await answer.text()
    scrape = normalise(text)
    assert missing_signals(scrape) == ()
    wire = scrape.wire(max_model_len_tokens=60)
    assert (wire.kv_cache_blocks, wire.kv_cache_block_size_tokens) == (16, 4), "without the null block"
    assert (wire.requests_running, wire.requests_waiting, wire.kv_cache_usage_ratio) == (0, 0, 0.0)
    assert (wire.prompt_tokens_total, wire.generation_tokens_total) == (60, 180)
    assert wire.preemptions_total is not None
    assert wire.preemptions_total > 0
    assert 'vllm:request_success_total{engine="0",finished_reason="length",model_name="demo"} 6.0' in text
    assert 'vllm:time_to_first_token_seconds_count{engine="0",model_name="demo"} 6.0' in text
    assert 'vllm:inter_token_latency_seconds_count{engine="0",model_name="demo"} 174.0' in text


async def test_every_metric_is_one_of_vllm_s(engine: SimulatedServer, session: aiohttp.ClientSession) -> None:
    recorded = Path(__file__).parents[1] / "sidecar" / "expositions" / "vllm-0.32.0.recorded.txt"
    known = {line for line in recorded.read_text().splitlines() if line.startswith("# TYPE")}
    async with session.get(f"{engine.url}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    ours = {line for line in lines if line.startswith("# TYPE") and "_created" not in line}
    assert len(ours) >= 15
    assert sorted(ours - known) == []


async def test_a_client_that_hangs_up_frees_its_blocks(session: aiohttp.ClientSession) -> None:
    slow = StepTime(base=0.02, per_prefill_token=0.0, per_decode=0.0, per_context_token=0.0)
    async with SimulatedServer(config=CONFIG, step_time=slow) as engine:
        body = {"prompt": [7] * 10, "max_tokens": 50, "ignore_eos": True, "stream": True}
        async with session.post(f"{engine.url}/v1/completions", json=body) as answer:
            await answer.content.readany()
            assert engine.engine.pool.usage > 0
        while engine.engine.running:  # noqa: ASYNC110 the server sees it at its next write
            await asyncio.sleep(0.01)
        assert engine.engine.pool.usage == 0.0
        assert engine.exposition.finished["abort"] == 1


async def test_kv_events_are_published_and_can_be_had_again(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    endpoints = (f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay")
    async with SimulatedServer(config=CONFIG, step_time=FAST, kv_events=endpoints) as engine:
        for token in range(4):
            body = {"prompt": [token] * 20, "max_tokens": 5, "ignore_eos": True}
            async with session.post(f"{engine.url}/v1/completions", json=body) as answer:
                assert answer.status == 200
                await answer.read()
        context = zmq.asyncio.Context()
        replay = context.socket(zmq.DEALER)
        replay.connect(endpoints[1])
        await replay.send_multipart((b"", (0).to_bytes(8, "big")))
        batches = []
        while True:
            *_, sequence, payload = await replay.recv_multipart()
            if not payload:
                break
            batches.append(decode(int.from_bytes(sequence, "big"), payload))
        live = context.socket(zmq.SUB)
        live.subscribe(b"")
        live.connect(endpoints[0])
        while True:  # a subscription takes a moment, and what was sent before is not for it
            body = {"prompt": [len(batches)] * 20, "max_tokens": 5, "ignore_eos": True}
            async with session.post(f"{engine.url}/v1/completions", json=body) as answer:
                await answer.read()
            if await live.poll(50):
                break
        topic, _, payload = await live.recv_multipart()
        assert topic == b""
        assert payload
        context.destroy(linger=0)
    assert [batch.sequence for batch in batches] == list(range(len(batches)))
    events = [event for batch in batches for event in batch.events]
    assert sum(batch.unreadable_events for batch in batches) == 0
    stored = [block for event in events if isinstance(event, BlocksStored) for block in event.blocks]
    removed = [block for event in events if isinstance(event, BlocksRemoved) for block in event.blocks]
    assert len(stored) == 4 * 6
    assert len(removed) == len(stored) - CONFIG.num_gpu_blocks + 1
    assert set(removed) <= set(stored)
