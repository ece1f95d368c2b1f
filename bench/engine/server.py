"""The simulated engine behind vLLM's HTTP, in real time: for tests that want many engines, or one that is not on CPU.

    async with SimulatedServer(config=config, step_time=step_time) as engine:
        await session.post(f"{engine.url}/v1/completions", json={"model": engine.model, ...})

`python -m bench.engine.server --port 8100` runs one as a process. Served: completions and chat completions (streamed or
not, ``n``, usage), /health, /version, /v1/models, /metrics, and KV events. A request that ends is told as vLLM tells it;
one whose client hangs up is aborted.

Answers are "token token token". Their length: with ``ignore_eos`` it is ``max_tokens``; with ``min_tokens`` it ends one
token after them (the end-of-text token), as the benchmarks' clients arrange it on the real engine; else it is drawn
from a lognormal distribution, median 100, by the prompt. A prompt is token ids, or text: four bytes are a token.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

from aiohttp import web

from bench.engine.blocks import Stored
from bench.engine.events import KvEventPublisher
from bench.engine.exposition import Exposition, Gauges
from bench.engine.fit import Fit
from bench.engine.model import Engine, EngineConfig, Request, StepTime, prompt_hashes

VERSION: Final = "0.32.0"
MODEL: Final = "demo"
_BYTES_PER_TOKEN: Final = 4
_TEXT: Final = " token"
_OUTPUT_MEDIAN: Final = 100
_OUTPUT_SIGMA: Final = 0.8


class BadRequestError(Exception):
    """What the engine answers 400 to; the message is the answer's."""


@dataclass
class Output:
    """One output of one request."""

    request: Request
    prompt: list[int]
    max_tokens: int
    arrived: float
    last_token: float | None = None
    tokens: asyncio.Queue[bool] = field(default_factory=asyncio.Queue)
    """One entry per token: whether it was the last."""

    @property
    def finish_reason(self) -> str:
        return "length" if self.request.generated >= self.max_tokens else "stop"


@dataclass(frozen=True)
class Asked:
    """A parsed request."""

    prompt: list[int]
    n: int
    max_tokens: int
    output_tokens: int
    stream: bool
    include_usage: bool
    continuous_usage: bool


class SimulatedServer:
    """One engine on a port of 127.0.0.1, for the length of an ``async with``."""

    def __init__(
        self,
        *,
        config: EngineConfig,
        step_time: StepTime,
        port: int = 0,
        model: str = MODEL,
        kv_events: tuple[str, str] | None = None,
    ) -> None:
        """``port`` 0: any. ``kv_events``: endpoints of the events and of their replay, ``ipc://PATH``."""
        self.model: Final = model
        self.engine = Engine(config, keep_events=kv_events is not None)
        self.exposition = Exposition(model=model, engine=self.engine)
        self._step_time, self._port, self._kv_events = step_time, port, kv_events
        self._publisher: KvEventPublisher | None = None
        self._sequences: dict[object, Output] = {}
        self._numbers = itertools.count()
        self._wake = asyncio.Event()
        self._stepping: asyncio.Task[None] | None = None
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """Base URL, without ``/v1``."""
        return f"http://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        if self._kv_events is not None:
            endpoint, replay_endpoint = self._kv_events
            self._publisher = KvEventPublisher(
                endpoint=endpoint, replay_endpoint=replay_endpoint, block_size=self.engine.config.block_size
            )
        application = web.Application(client_max_size=64 * 2**20)
        application.add_routes(
            [
                web.post("/v1/completions", self._completions),
                web.post("/v1/chat/completions", self._chat_completions),
                web.get("/v1/models", self._models),
                web.get("/health", self._health),
                web.get("/version", self._version),
                web.get("/metrics", self._metrics),
            ]
        )
        self._runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]
        self._stepping = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        assert self._runner is not None
        assert self._stepping is not None
        await self._runner.cleanup()
        self._stepping.cancel()
        await asyncio.gather(self._stepping, return_exceptions=True)
        if self._publisher is not None:
            await self._publisher.close()

    # The engine.

    async def _run(self) -> None:
        """Steps at the pace of the step model; what the loop is late by is made up in the next steps."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            batch = self.engine.schedule()
            if batch is None:
                self._wake.clear()
                await self._wake.wait()
                due = loop.time()
                continue
            due = max(due + self._step_time.seconds(batch), loop.time() - 1.0)
            await asyncio.sleep(due - loop.time())
            now = loop.time()
            completed = self.engine.complete(batch)
            for request in completed.tokens:
                sequence = self._sequences[request.name]
                self._observe(sequence, now)
                sequence.tokens.put_nowait(request.done)
            self.exposition.gauges = Gauges(
                running=len(self.engine.running), waiting=len(self.engine.waiting), usage=self.engine.pool.usage
            )
            if self._publisher is not None and (events := self.engine.pool.take_events()):
                await self._publisher.publish(events, at=time.time(), token_ids=self._stored_tokens)

    def _observe(self, sequence: Output, now: float) -> None:
        exposition, request = self.exposition, sequence.request
        if sequence.last_token is None:
            exposition.time_to_first_token.observe(now - sequence.arrived)
        else:
            exposition.inter_token_latency.observe(now - sequence.last_token)
        sequence.last_token = now
        if request.done:
            exposition.e2e_request_latency.observe(now - sequence.arrived)
            exposition.request_prompt_tokens.observe(request.prompt_tokens)
            exposition.request_generation_tokens.observe(request.generated)
            exposition.finished[sequence.finish_reason] += 1

    def _stored_tokens(self, event: Stored) -> list[int]:
        """Of stored blocks; output tokens are all the same one."""
        size = self.engine.config.block_size
        begin, end = event.first * size, (event.first + len(event.hashes)) * size
        sequence = self._sequences.get(event.request)
        prompt = sequence.prompt[begin:end] if sequence is not None else []
        return prompt + [0] * (end - begin - len(prompt))

    @contextlib.asynccontextmanager
    async def _generating(self, asked: Asked) -> AsyncIterator[list[Output]]:
        """The sequences of one request; those that are not over at the end are aborted."""
        hashes = prompt_hashes(asked.prompt, self.engine.config.block_size)
        sequences = []
        for _ in range(asked.n):
            request = Request(
                name=next(self._numbers),
                prompt_tokens=len(asked.prompt),
                output_tokens=asked.output_tokens,
                prefix_hashes=hashes,
            )
            sequence = Output(request, asked.prompt, asked.max_tokens, asyncio.get_running_loop().time())
            self._sequences[request.name] = sequence
            self.engine.add(request)
            sequences.append(sequence)
        self._wake.set()
        try:
            yield sequences
        finally:
            for sequence in sequences:
                if not sequence.request.done:
                    self.engine.abort(sequence.request)
                    self.exposition.finished["abort"] += 1
                del self._sequences[sequence.request.name]

    # HTTP.

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, chat=False)

    async def _chat_completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, chat=True)

    async def _answer(self, http: web.Request, *, chat: bool) -> web.StreamResponse:
        try:
            asked = self._parse(await http.read(), chat=chat)
        except BadRequestError as error:
            return _error(400, "BadRequestError", str(error))
        except LookupError as error:
            return _error(404, "NotFoundError", str(error.args[0]))
        form = _Form(chat=chat, number=next(self._numbers), model=self.model, asked=asked)
        async with self._generating(asked) as sequences:
            if asked.stream:
                return await self._stream(http, form, sequences)
            for sequence in sequences:
                while not await sequence.tokens.get():
                    pass
            return web.json_response(form.whole(sequences))

    async def _stream(self, http: web.Request, form: "_Form", sequences: Sequence[Output]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(http)
        if form.chat:
            for index in range(len(sequences)):
                await response.write(form.role(index))
        if len(sequences) == 1:
            await _stream_one(response, form, 0, sequences[0])
        else:
            async with asyncio.TaskGroup() as group:
                for index, sequence in enumerate(sequences):
                    group.create_task(_stream_one(response, form, index, sequence))
        if form.asked.include_usage:
            await response.write(form.usage_chunk(sequences))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    def _parse(self, body: bytes, *, chat: bool) -> Asked:
        """Raises BadRequestError, or LookupError for another model's name."""
        try:
            document = json.loads(body)
        except ValueError as error:
            raise BadRequestError(f"The body is not JSON: {error}.") from error
        if not isinstance(document, dict):
            raise BadRequestError("The body must be a JSON object.")
        if document.get("model", self.model) != self.model:
            raise LookupError(f"The model `{document['model']}` does not exist.")
        prompt = _chat_prompt(document) if chat else _token_ids(document.get("prompt"))
        longest = self.engine.config.max_model_len
        room = longest - len(prompt)
        if room < 1:
            raise BadRequestError(
                f"This model's maximum context length is {longest} tokens. However, your request has {len(prompt)} input "
                "tokens. Please reduce the length of the input messages."
            )
        given = document.get("max_completion_tokens", document.get("max_tokens"))
        default = room if chat else 16
        max_tokens = min(_at_least_one("max_tokens", default if given is None else given), room)
        options = document.get("stream_options") or {}
        return Asked(
            prompt=prompt,
            n=_at_least_one("n", document.get("n", 1)),
            max_tokens=max_tokens,
            output_tokens=_output_tokens(document, prompt, max_tokens),
            stream=bool(document.get("stream")),
            include_usage=bool(options.get("include_usage")),
            continuous_usage=bool(options.get("continuous_usage_stats")),
        )

    async def _models(self, _: web.Request) -> web.Response:
        model = {
            "id": self.model,
            "object": "model",
            "owned_by": "vllm",
            "max_model_len": self.engine.config.max_model_len,
        }
        return web.json_response({"object": "list", "data": [model]})

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": VERSION})

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self.exposition.text(), headers={"Content-Type": "text/plain; version=0.0.4"})


@dataclass(frozen=True)
class _Form:
    """The JSON of one answer."""

    chat: bool
    number: int
    model: str
    asked: Asked

    def role(self, index: int) -> bytes:
        """The first chunk of a chat."""
        return self._chunk(
            [{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}], None
        )

    def token(self, index: int, sequence: Output, generated: int, *, last: bool) -> bytes:
        """The chunk of one token."""
        reason = sequence.finish_reason if last else None
        text = {"delta": {"content": _TEXT}} if self.chat else {"text": _TEXT}
        usage = self._usage(generated) if self.asked.continuous_usage else None
        return self._chunk([{"index": index, **text, "finish_reason": reason}], usage)

    def usage_chunk(self, sequences: Sequence[Output]) -> bytes:
        """The last chunk, which only has the usage."""
        return self._chunk([], self._usage(sum(each.request.generated for each in sequences)))

    def whole(self, sequences: Sequence[Output]) -> dict[str, Any]:
        """An answer that is not streamed."""
        choices = []
        for index, sequence in enumerate(sequences):
            text = _TEXT * sequence.request.generated
            content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            choices.append({"index": index, **content, "finish_reason": sequence.finish_reason})
        kind = "chat.completion" if self.chat else "text_completion"
        return {
            **self._head(kind),
            "choices": choices,
            "usage": self._usage(sum(s.request.generated for s in sequences)),
        }

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> bytes:
        document = {**self._head("chat.completion.chunk" if self.chat else "text_completion"), "choices": choices}
        if usage is not None:
            document["usage"] = usage
        return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.number}", "object": kind, "created": int(time.time()), "model": self.model}

    def _usage(self, generated: int) -> dict[str, int]:
        prompt = len(self.asked.prompt)
        return {"prompt_tokens": prompt, "total_tokens": prompt + generated, "completion_tokens": generated}


async def _stream_one(response: web.StreamResponse, form: _Form, index: int, sequence: Output) -> None:
    generated, last = 0, False
    while not last:
        last = await sequence.tokens.get()
        generated += 1
        await response.write(form.token(index, sequence, generated, last=last))


def _error(status: int, kind: str, message: str) -> web.Response:
    document = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return web.json_response(document, status=status)


def _at_least_one(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadRequestError(f"{name} must be a whole number of at least 1, got {json.dumps(value)}.")
    return value


def _token_ids(prompt: object) -> list[int]:
    """Of one prompt: a string, or token ids."""
    if isinstance(prompt, str):
        data = prompt.encode()
        return [
            int.from_bytes(data[i : i + _BYTES_PER_TOKEN], "big") for i in range(0, len(data), _BYTES_PER_TOKEN)
        ] or [0]
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return prompt
    raise BadRequestError("prompt must be a string or a list of token ids; lists of prompts are not simulated.")


def _chat_prompt(document: dict[str, Any]) -> list[int]:
    messages = document.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise BadRequestError("messages must be a list of messages, and not empty.")
    return _token_ids("".join(f"<|{each.get('role')}|>\n{each.get('content')}" for each in messages))


def _output_tokens(document: dict[str, Any], prompt: list[int], max_tokens: int) -> int:
    if document.get("ignore_eos"):
        return max_tokens
    minimum = document.get("min_tokens") or 0
    if minimum:
        return min(max_tokens, minimum + 1)
    drawn = random.Random(str(prompt)).lognormvariate(math.log(_OUTPUT_MEDIAN), _OUTPUT_SIGMA)
    return max(1, min(max_tokens, round(drawn)))


async def _serve(server: SimulatedServer) -> None:
    async with server:
        print(f"listening on {server.url}", flush=True)
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.engine.server", description=__doc__)
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--num-gpu-blocks", type=int, default=97)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--fit", default="vllm-0.32-cpu", help="step times: bench/engine/fits/NAME.json")
    parser.add_argument(
        "--kv-events", nargs=2, metavar=("ENDPOINT", "REPLAY"), help="publish KV events: ipc://PATH twice"
    )
    arguments = parser.parse_args()
    config = EngineConfig(
        num_gpu_blocks=arguments.num_gpu_blocks,
        block_size=arguments.block_size,
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        max_model_len=arguments.max_model_len,
    )
    server = SimulatedServer(
        config=config,
        step_time=Fit.read(arguments.fit).step_time,
        port=arguments.port,
        kv_events=tuple(arguments.kv_events) if arguments.kv_events else None,
    )
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(server))


if __name__ == "__main__":
    main()
