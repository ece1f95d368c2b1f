"""The API over real HTTP on loopback, in front of an engine that answers without computing."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import aiohttp.web
import pytest
import pytest_asyncio

from kvplane_api.wire import SidecarState
from kvplane_runtime.ring.admission import Refusal
from kvplane_runtime.ring.api import Api, serve
from kvplane_runtime.ring.openai import ServedModel
from kvplane_runtime.ring.state import RingState
from tests.ring.bytes_tokenizer import BytesTokenizer
from tests.ring.fake_engine import FakeEngine

MODEL = ServedModel("tiny", vocabulary=256, tokenizer=BytesTokenizer(), stop_ids=frozenset())
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = {"prompt": "hi", "max_tokens": 20}
HI_CHAT = {"messages": [{"role": "user", "content": "hi"}]}


class Served:
    """An API that listens, its engine, and a client."""

    def __init__(
        self, engine: FakeEngine, api: Api, runner: aiohttp.web.AppRunner, session: aiohttp.ClientSession
    ) -> None:
        self.engine = engine
        self.api = api
        self.runner = runner
        self.session = session

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.session.post(path, data=data, headers=headers) as response:
            return response.status, await response.json(), response.headers

    async def stream(self, path: str, body: dict[str, Any]) -> tuple[list[Any], list[str]]:
        """Events, without the last ``[DONE]``, and comments."""
        async with self.session.post(path, json={**body, "stream": True}) as response:
            assert response.headers["Content-Type"].startswith("text/event-stream")
            lines = (await response.read()).decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        comments = [line for line in lines if line.startswith(":")]
        return [json.loads(line[6:]) for line in lines[:-2] if line.startswith("data: ")], comments

    async def get(self, path: str) -> tuple[int, str]:
        async with self.session.get(path) as response:
            return response.status, await response.text()


@pytest_asyncio.fixture
async def served() -> AsyncIterator[Served]:
    engine = FakeEngine()
    api = Api(engine=engine, model=MODEL, max_body_bytes=100_000)
    runner = await serve(api, host="127.0.0.1", port=0)
    host, port = runner.addresses[0][:2]
    async with aiohttp.ClientSession(f"http://{host}:{port}") as session:
        yield Served(engine, api, runner, session)
    await runner.cleanup()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  (what is waited for is not an event of this loop)
            await asyncio.sleep(0.005)


async def test_a_completion(served: Served) -> None:
    served.engine.cached = 1
    status, body, _ = await served.post(COMPLETIONS, HI)
    assert status == 200
    assert body["object"] == "text_completion"
    assert body["model"] == "tiny"
    assert body["choices"] == [{"index": 0, "text": "hello", "logprobs": None, "finish_reason": "length"}]
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 5,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


async def test_a_chat(served: Served) -> None:
    status, body, _ = await served.post(CHAT, HI_CHAT)
    assert status == 200
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello"},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    assert bytes(served.engine.requests[0].prompt) == b"<user>hi<assistant>"


async def test_several_prompts_with_several_outputs(served: Served) -> None:
    status, body, _ = await served.post(COMPLETIONS, {"prompt": ["a", "bc"], "n": 2, "return_token_ids": True})
    assert status == 200
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(i, "hello") for i in range(4)]
    assert body["choices"][3]["token_ids"] == list(b"hello")
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 20


async def test_a_streamed_completion(served: Served) -> None:
    events, _ = await served.stream(COMPLETIONS, {**HI, "stream_options": {"include_usage": True}})
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "hello"
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 5
    assert len({event["id"] for event in events}) == 1


async def test_a_streamed_chat(served: Served) -> None:
    events, _ = await served.stream(CHAT, HI_CHAT)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": "h"}
    assert all("role" not in delta for delta in deltas[1:])
    assert "".join(delta["content"] for delta in deltas) == "hello"
    assert {event["object"] for event in events} == {"chat.completion.chunk"}


async def test_a_stream_tells_the_progress_of_a_long_prompt(served: Served) -> None:
    served.engine.progress = [(40, 100), (80, 100)]
    _, comments = await served.stream(COMPLETIONS, HI)
    assert comments == [": prefill 40/100", ": prefill 80/100"]


async def test_a_stop_string_ends_its_output_and_the_engine_hears_of_it(served: Served) -> None:
    status, body, _ = await served.post(COMPLETIONS, {**HI, "stop": "ll", "n": 2})
    assert status == 200
    assert [(choice["text"], choice["finish_reason"]) for choice in body["choices"]] == [("he", "stop")] * 2
    assert body["usage"]["completion_tokens"] == 8
    name = served.engine.requests[0].id
    assert served.engine.aborted[:2] == [(name, 0), (name, 1)]


async def test_a_stop_token_counts_but_has_no_text(served: Served) -> None:
    _, body, _ = await served.post(COMPLETIONS, {**HI, "stop_token_ids": [ord("o")]})
    assert body["choices"][0]["text"] == "hell"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 5


async def test_log_probabilities(served: Served) -> None:
    _, body, _ = await served.post(COMPLETIONS, {**HI, "max_tokens": 2, "logprobs": 1})
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["h", "e"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"A": -1.0}, {"A": -1.0}],
        "text_offset": [0, 1],
    }
    _, body, _ = await served.post(CHAT, {**HI_CHAT, "max_tokens": 1, "logprobs": True, "top_logprobs": 1})
    assert body["choices"][0]["logprobs"]["content"] == [
        {
            "token": "h",
            "logprob": -0.5,
            "bytes": [104],
            "top_logprobs": [{"token": "A", "logprob": -1.0, "bytes": [65]}],
        }
    ]
    events, _ = await served.stream(COMPLETIONS, {**HI, "max_tokens": 2, "logprobs": 0})
    tokens = [token for e in events if e["choices"][0]["logprobs"] for token in e["choices"][0]["logprobs"]["tokens"]]
    assert tokens == ["h", "e"]


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        (COMPLETIONS, b"{", 400, "malformed_json"),
        (COMPLETIONS, {"prompt": ""}, 400, "empty_prompt"),
        (COMPLETIONS, {"prompt": "x" * 500}, 400, "context_length_exceeded"),
        (COMPLETIONS, {"prompt": ["a", "x" * 500]}, 400, "context_length_exceeded"),
        (COMPLETIONS, {"prompt": "x" * 100_001}, 413, "body_too_large"),
        (COMPLETIONS, {**HI, "model": "other"}, 404, "model_not_found"),
        (CHAT, {"messages": []}, 400, "empty_prompt"),
        (CHAT, {**HI_CHAT, "tools": [{}]}, 400, "unsupported_parameter"),
        ("/v1/embeddings", {}, 404, "not_found"),
        ("/v1/models", {}, 405, "method_not_allowed"),
    ],
)
async def test_bad_input_gets_an_error_object(served: Served, path: str, body: Any, status: int, code: str) -> None:
    got, answer, headers = await served.post(path, body, **{"x-request-id": "mine"})
    assert got == status
    assert answer["error"]["code"] == code
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["message"].endswith(".")
    assert headers["x-request-id"] == "mine"


async def test_a_refused_prompt_ends_those_beside_it(served: Served) -> None:
    await served.post(COMPLETIONS, {"prompt": ["a", "x" * 500]})
    assert served.engine.aborted[0] == (served.engine.requests[0].id, None)
    assert served.api.in_flight == 0


async def test_no_room_now_says_when_to_come_back(served: Served) -> None:
    served.engine.refusal = Refusal(429, "kv_cache_full", "No room now.", None, 7, "kv")
    status, answer, headers = await served.post(COMPLETIONS, HI)
    assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
    assert (headers["retry-after"], headers["x-kvplane-reason"]) == ("7", "kv")


async def test_a_request_that_fails_midway(served: Served) -> None:
    served.engine.fails = Refusal(503, "ring_too_small", "A rank was lost.", None, 30)
    status, answer, _ = await served.post(COMPLETIONS, HI)
    assert (status, answer["error"]["code"]) == (503, "ring_too_small")
    events, _ = await served.stream(COMPLETIONS, HI)
    assert events[-1] == {
        "error": {"message": "A rank was lost.", "type": "server_error", "param": None, "code": "ring_too_small"}
    }


async def test_an_engine_with_a_fault_of_its_own(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    def fault() -> None:
        raise ZeroDivisionError

    served.engine.on_token = fault
    status, answer, _ = await served.post(COMPLETIONS, HI)
    assert (status, answer["error"]["code"]) == (500, "internal_error")
    assert "ZeroDivisionError" in caplog.text


async def test_a_fault_in_the_midst_of_a_stream_is_said_in_it(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    def fault() -> None:
        raise ZeroDivisionError

    served.engine.on_token = fault
    events, _ = await served.stream(COMPLETIONS, HI)
    assert [event["error"]["code"] for event in events] == ["internal_error"]
    assert "ZeroDivisionError" in caplog.text


async def test_a_stream_in_which_nothing_comes_is_kept_open(served: Served) -> None:
    served.api._quiet_seconds = 0.05  # here alone: other streams are to have no comment where the machine is busy
    served.engine.gate.clear()
    async with served.session.post(COMPLETIONS, json={**HI, "stream": True}) as response:
        assert await response.content.readuntil(b"\n\n") == b": waiting\n\n"
        served.engine.gate.set()
        assert (await response.read()).endswith(b"data: [DONE]\n\n")


async def test_an_engine_that_ends_too_early(served: Served) -> None:
    served.engine.answer = ""
    status, answer, _ = await served.post(COMPLETIONS, HI)
    assert (status, answer["error"]["code"]) == (503, "engine_stopped")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_ends_its_request(served: Served, stream: bool) -> None:
    served.engine.gate.clear()
    asking = asyncio.create_task(served.post(COMPLETIONS, {**HI, "stream": stream}))
    await until(lambda: len(served.engine.requests) == 1)
    asking.cancel()
    await until(lambda: served.api.in_flight == 0)
    assert served.engine.aborted == [(served.engine.requests[0].id, None)]
    assert served.api.tally.disconnects == 1


async def test_a_client_that_goes_amid_a_write_is_no_error(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def write(response: aiohttp.web.StreamResponse, data: bytes) -> None:
        """As the transport does it between the end of the connection and the news of it."""
        assert response._req is not None
        assert response._req.transport is not None
        response._req.transport.abort()
        raise ConnectionResetError("Cannot write to closing transport")

    monkeypatch.setattr(aiohttp.web.StreamResponse, "write", write)
    with pytest.raises(aiohttp.ClientError):
        await served.post(COMPLETIONS, {**HI, "stream": True})
    await until(lambda: served.api.in_flight == 0)
    assert served.api.tally.disconnects == 1
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_request_ids_are_the_clients_or_new(served: Served) -> None:
    _, _, mine = await served.post(COMPLETIONS, HI, **{"x-request-id": "abc-1"})
    assert mine["x-request-id"] == "abc-1"
    _, _, new = await served.post(COMPLETIONS, HI, **{"x-request-id": "a b"})
    assert len(new["x-request-id"]) == 32
    async with served.session.post(COMPLETIONS, json={**HI, "stream": True}, headers={"x-request-id": "s"}) as response:
        assert response.headers["x-request-id"] == "s"


async def test_health_is_that_of_the_ring(served: Served) -> None:
    assert await served.get("/health") == (200, '{"ready": true}')
    served.engine.set(formed=False, members=(0, 1, 3), loading={2: 0.25})
    status, text = await served.get("/health")
    assert (status, json.loads(text)) == (
        503,
        {"ready": False, "reason": "The ring is not formed: 3 of 4 ranks. Rank 2 has loaded 25%."},
    )


@pytest.mark.parametrize("formed", [True, False])
async def test_a_rank_0_that_hangs_is_told_from_one_that_waits(served: Served, formed: bool) -> None:
    """Also while it drains: what it waits for will not end."""
    served.engine.set(formed=formed)
    served.engine.hangs = "A step does not end."
    for draining in (False, True):
        served.api.draining = draining
        status, text = await served.get("/health")
        assert (status, json.loads(text)) == (500, {"ready": False, "reason": "A step does not end."})


async def test_requests_wait_for_a_ring_that_forms_again_but_not_for_the_first(served: Served) -> None:
    served.engine.set(formed=False)
    assert (await served.post(COMPLETIONS, HI))[0] == 200
    served.engine.set(epoch=-1)
    status, answer, headers = await served.post(COMPLETIONS, HI)
    assert (status, answer["error"]["code"], headers["retry-after"]) == (503, "engine_loading", "5")


async def test_draining_ends_what_runs_and_takes_no_more(served: Served) -> None:
    served.engine.gate.clear()
    asking = asyncio.create_task(served.post(COMPLETIONS, HI))
    await until(lambda: served.api.in_flight == 1)
    assert not await served.api.drain(seconds=0)
    status, answer, _ = await served.post(COMPLETIONS, HI)
    assert (status, answer["error"]["code"]) == (503, "draining")
    assert (await served.get("/health"))[0] == 503
    served.engine.gate.set()
    assert await served.api.drain(seconds=5)
    assert (await asking)[0] == 200


async def test_an_end_waits_for_no_client(served: Served) -> None:
    served.engine.gate.clear()

    async def ask() -> None:
        async with served.session.post(COMPLETIONS, json={**HI, "stream": True}) as response:
            await response.read()

    asking = asyncio.create_task(ask())
    await until(lambda: served.api.in_flight == 1)
    async with asyncio.timeout(30):
        await served.runner.cleanup()
    with pytest.raises(aiohttp.ClientError):
        await asking
    await until(lambda: served.api.in_flight == 0)


async def test_models(served: Served) -> None:
    status, text = await served.get("/v1/models")
    (card,) = json.loads(text)["data"]
    assert (status, card["id"], card["max_model_len"]) == (200, "tiny", 400)
    assert json.loads((await served.get("/v1/models/tiny"))[1])["id"] == "tiny"
    status, text = await served.get("/v1/models/a/b")
    assert (status, json.loads(text)["error"]["code"]) == (404, "model_not_found")


async def test_the_state_is_what_readers_of_paged_engines_know(served: Served) -> None:
    _, text = await served.get("/state")
    known = SidecarState.model_validate_json(text)
    assert known.pod == "ring-0"
    assert known.engine.kv_cache_capacity_tokens == 400
    assert known.engine.kv_cache_usage_ratio == 0.5
    engine, admission = known.engine, known.admission
    assert (engine.requests_waiting, engine.waiting_prompt_tokens, engine.waiting_kv_tokens) == (2, 50, 30)
    assert admission is not None
    assert (admission.running, admission.queued) == (5, 0), "what waits does so in the engine, and counts once"
    ring = RingState.model_validate_json(text).ring
    assert ring.kv_tokens == (10, 20, 30, 40)
    assert ring.exposed_wait_ratio == 0.125
    assert ring.imbalance_ratio == pytest.approx(1 / 3)


async def test_the_version(served: Served) -> None:
    status, text = await served.get("/version")
    assert status == 200
    assert json.loads(text)["version"]
