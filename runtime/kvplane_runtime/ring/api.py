"""OpenAI's API of the ring, on rank 0: HTTP in front of an :class:`Engine`.

==========================  ====================================================================================
``/v1/completions``         text or token ids, several prompts, ``n``; streamed (SSE) or whole
``/v1/chat/completions``    through the model's chat template
``/v1/models``              the one model, with ``max_model_len``: what the ring takes when it is empty and whole
``/health``                 200 while the ring is formed and takes requests, 500 if rank 0 hangs, else 503; JSON with the reason
``/state``                  :class:`kvplane_runtime.ring.state.RingState` as JSON
``/metrics``                for Prometheus: vLLM's names for what every engine has, ``kvplane_ring_*`` for the rest
``/version``                this program's
==========================  ====================================================================================

Every error is an OpenAI error object; every answer carries ``x-request-id``, the client's own or a new one. A client that
goes away ends its request. While a long prompt is computed, a stream carries its progress as SSE comments, and while it
waits for a ring that heals, comments that keep proxies from closing it.
"""

import asyncio
import importlib.metadata
import json
import logging
import re
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from kvplane_runtime.ring import health, openai, state
from kvplane_runtime.ring.admission import Refusal
from kvplane_runtime.ring.metrics import RingCollector, Tally
from kvplane_runtime.ring.openai import Asked, BadRequestError, ServedModel
from kvplane_runtime.ring.requests import Accepted, Ended, Event, Failed, Progress, Request, Token
from kvplane_runtime.ring.sampling import Sampled
from kvplane_runtime.ring.state import State
from kvplane_runtime.ring.tokens import TextStream, Tokenizer

log = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 64 * 1024 * 1024
"""A million tokens as JSON numbers take 7 MiB, as text 4."""
QUIET_SECONDS: Final = 15.0
"""A stream in which nothing comes for so long carries a comment: proxies close silent ones, after 60 s by default in nginx."""
_LARGE_BODY: Final = 32 * 1024
"""Bodies from here on are parsed and tokenized off the event loop."""
_DRAIN_CHECK_SECONDS: Final = 0.05
_LINGER_SECONDS: Final = 1.0
"""Who has not read the end of an answer so long after the drain is cut off; aiohttp would wait for a minute, twice."""
_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
_OWN_FAULT: Final = Refusal(500, "internal_error", "The engine has a fault of its own; its log has the details.")
_request_id: Final[ContextVar[str]] = ContextVar("request_id")
"""Of the request that this task answers."""
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class RejectedError(Exception):
    """The engine does not take a request."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class Engine(Protocol):
    """What serves the requests: a scheduler and a ring behind it."""

    def submit(self, request: Request) -> AsyncIterator[Event]:
        """The events of ``request``: ``Accepted`` first, or RejectedError is raised; over after the last output's ``Ended``,
        or after ``Failed``. Nothing follows for what was aborted; of an aborted request the iterator ends.
        """

    def abort(self, request: str, output: int | None = None) -> None:
        """Ends a request, or one output of it; does nothing where it is over already."""

    def state(self) -> State:
        """The ring now."""

    def hung(self) -> str | None:
        """What shows that rank 0's own model hangs, so that only a restart helps, in a sentence; None while it does not."""


@dataclass(slots=True)
class _Choice:
    """One output on its way to the client."""

    index: int
    text: TextStream
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    sampled: list[tuple[Sampled, int]] = field(default_factory=list)
    """With the length of the text before each."""
    length: int = 0
    finish: str | None = None


@dataclass(frozen=True, slots=True)
class _Piece:
    """What one event adds to a choice."""

    choice: _Choice
    text: str
    tokens: tuple[int, ...]
    sampled: tuple[Sampled, ...]
    finish: str | None


class _Exchange:
    """One client request: a request of the engine for each prompt, and what becomes of their events."""

    def __init__(
        self,
        asked: Asked,
        *,
        engine: Engine,
        model: ServedModel,
        tally: Tally,
        clock: Callable[[], float],
        quiet_seconds: float,
    ) -> None:
        self.asked = asked
        self.id = f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = model
        self.cached_tokens = 0
        self._engine = engine
        self._tally = tally
        self._clock = clock
        self._quiet_seconds = quiet_seconds
        self._arrived = clock()
        self._newest: dict[int, float] = {}
        """By choice, when its newest token came."""
        self._requests = [
            Request(
                id=f"{self.id}-{number}",
                prompt=prompt,
                max_tokens=asked.max_tokens,
                sampling=asked.sampling,
                outputs=asked.outputs,
                stop_ids=asked.stop_ids,
            )
            for number, prompt in enumerate(asked.prompts)
        ]
        self._number = {request.id: number for number, request in enumerate(self._requests)}
        self.choices = [
            _Choice(index, TextStream(model.tokenizer, stop=asked.stop))
            for index in range(len(asked.prompts) * asked.outputs)
        ]
        self._streams: list[AsyncIterator[Event]] = []
        self._queue: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    async def begin(self) -> None:
        """All prompts are taken in, or RejectedError is raised and none is."""
        for request in self._requests:
            stream = self._engine.submit(request)
            self._streams.append(stream)
            accepted = await anext(stream)
            assert isinstance(accepted, Accepted)  # noqa: S101  (the protocol says so)
            self.cached_tokens += accepted.cached_tokens
        self._tasks = [asyncio.create_task(self._forward(stream)) for stream in self._streams]

    def end(self, *, completed: bool) -> None:
        """The client has its answer, or has gone; whatever still runs is ended."""
        for task in self._tasks:
            task.cancel()
        for request in self._requests:
            self._engine.abort(request.id)
        if completed and all(choice.finish is not None for choice in self.choices):
            self._tally.completed(
                seconds=self._clock() - self._arrived,
                prompt_tokens=sum(map(len, self.asked.prompts)),
                generated_tokens=sum(len(choice.tokens) for choice in self.choices),
            )

    async def _forward(self, stream: AsyncIterator[Event]) -> None:
        try:
            async for event in stream:
                self._queue.put_nowait(event)
        except Exception as error:  # noqa: BLE001  (raised again where the answer is written)
            self._queue.put_nowait(error)
        else:
            self._queue.put_nowait(None)

    async def pieces(self) -> AsyncIterator[_Piece | Progress | None]:
        """What the outputs grow by, until all are over, and None where nothing came for a while; raises RejectedError where
        the engine gives up.
        """
        while any(choice.finish is None for choice in self.choices):
            try:
                async with asyncio.timeout(self._quiet_seconds):
                    event = await self._queue.get()
            except TimeoutError:
                yield None
                continue
            match event:
                case Token():
                    yield self._token(event)
                case Ended():
                    choice = self._choice(event.request, event.output)
                    if choice.finish is None:
                        yield self._ended(choice, event.reason)
                case Progress():
                    yield event
                case Failed():
                    raise RejectedError(event.refusal)
                case Exception():
                    raise event
                case None if self._queue.empty() and all(task.done() for task in self._tasks):
                    raise RejectedError(
                        Refusal(
                            503,
                            "engine_stopped",
                            "The engine ended the request before it was complete; retry.",
                            None,
                            1,
                        )
                    )

    def _choice(self, request: str, output: int) -> _Choice:
        return self.choices[self._number[request] * self.asked.outputs + output]

    def _token(self, event: Token) -> _Piece:
        choice, sampled = self._choice(event.request, event.output), event.sampled
        if choice.finish is not None:  # it came before the engine heard of the stop string
            return _Piece(choice, "", (), (), None)
        now = self._clock()
        self._tally.token(since_arrival=now - self._arrived, since_last=self._since_last(choice.index, now))
        choice.tokens.append(sampled.token)
        choice.sampled.append((sampled, choice.length))
        text = "" if sampled.token in self.asked.stop_ids else choice.text.push(sampled.token)
        if choice.text.stopped:
            choice.finish = "stop"
            self._engine.abort(event.request, event.output)
        return self._add(choice, text, (sampled,))

    def _since_last(self, index: int, now: float) -> float | None:
        last = self._newest.get(index)
        self._newest[index] = now
        return None if last is None else now - last

    def _ended(self, choice: _Choice, reason: str) -> _Piece:
        rest = choice.text.finish()
        choice.finish = "stop" if choice.text.stopped else reason
        return self._add(choice, rest, ())

    @staticmethod
    def _add(choice: _Choice, text: str, sampled: tuple[Sampled, ...]) -> _Piece:
        choice.pieces.append(text)
        choice.length += len(text)
        return _Piece(choice, text, tuple(one.token for one in sampled), sampled, choice.finish)

    def usage(self) -> dict[str, Any]:
        """The tokens as OpenAI counts them: a prompt once, however many outputs it has."""
        prompt = sum(map(len, self.asked.prompts))
        generated = sum(len(choice.tokens) for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Api:
    """The handlers, and what they count."""

    def __init__(
        self,
        *,
        engine: Engine,
        model: ServedModel,
        clock: Callable[[], float] = time.monotonic,
        max_body_bytes: int = MAX_BODY_BYTES,
        quiet_seconds: float = QUIET_SECONDS,
    ) -> None:
        self._engine = engine
        self._model = model
        self._clock = clock
        self._max_body_bytes = max_body_bytes
        self._quiet_seconds = quiet_seconds
        self._created = int(time.time())
        self.draining = False
        self.in_flight = 0
        """Generating requests."""
        self.tally = Tally()
        self._registry = CollectorRegistry()
        self._registry.register(RingCollector(state=engine.state, tally=self.tally, in_flight=lambda: self.in_flight))

    def application(self) -> web.Application:
        """The routes. Run it with handler cancellation, as :func:`serve` does: else clients that go away are not noticed."""
        application = web.Application(client_max_size=self._max_body_bytes, middlewares=[self._middleware])
        router = application.router
        router.add_post("/v1/completions", self.completions)
        router.add_post("/v1/chat/completions", self.chat)
        router.add_get("/v1/models", self.models)
        router.add_get("/v1/models/{model:.+}", self.named_model)
        router.add_get("/health", self.health)
        router.add_get("/state", self.state)
        router.add_get("/metrics", self.metrics)
        router.add_get("/version", self.version)
        return application

    async def drain(self, *, seconds: float) -> bool:
        """Takes no more requests and waits for those in flight, at most so long; whether all have ended."""
        self.draining = True
        end = self._clock() + seconds
        # Polled, since the end depends on the clock and on all requests, not on one event.
        while self.in_flight and self._clock() < end:  # noqa: ASYNC110  (see above)
            await asyncio.sleep(_DRAIN_CHECK_SECONDS)
        return self.in_flight == 0

    # Generation.

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """``POST /v1/completions``."""
        return await self._generate(request, chat=False)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """``POST /v1/chat/completions``."""
        return await self._generate(request, chat=True)

    async def _generate(self, request: web.Request, *, chat: bool) -> web.StreamResponse:
        refusal = self._closed()
        if refusal is not None:
            raise RejectedError(refusal)
        self.in_flight += 1
        completed = False
        exchange: _Exchange | None = None
        try:
            asked = await self._asked(await request.read(), chat=chat)
            exchange = self._exchange(asked)
            await exchange.begin()
            response = await (_stream(request, exchange) if asked.stream else _whole(exchange))
        except (asyncio.CancelledError, ConnectionError):
            self.tally.disconnects += 1
            raise
        else:
            completed = True
            return response
        finally:
            self.in_flight -= 1
            if exchange is not None:
                exchange.end(completed=completed)

    def _exchange(self, asked: Asked) -> _Exchange:
        return _Exchange(
            asked,
            engine=self._engine,
            model=self._model,
            tally=self.tally,
            clock=self._clock,
            quiet_seconds=self._quiet_seconds,
        )

    def _closed(self) -> Refusal | None:
        if self.draining:
            return Refusal(503, "draining", "The engine shuts down; retry at another one.", None, 1)
        if self._engine.state().epoch < 0:
            return Refusal(503, "engine_loading", "The ring is not formed yet; retry soon.", None, 5)
        return None

    async def _asked(self, body: bytes, *, chat: bool) -> Asked:
        seed = secrets.randbits(63)
        if len(body) < _LARGE_BODY:
            return openai.parse(body, chat=chat, model=self._model, random_seed=seed)
        return await asyncio.to_thread(openai.parse, body, chat=chat, model=self._model, random_seed=seed)

    # What is known.

    async def models(self, _: web.Request) -> web.Response:
        """``GET /v1/models``."""
        return web.json_response({"object": "list", "data": [self._card()]})

    async def named_model(self, request: web.Request) -> web.Response:
        """``GET /v1/models/{model}``."""
        name = request.match_info["model"]
        if name != self._model.name:
            raise RejectedError(
                Refusal(
                    404,
                    "model_not_found",
                    f"The model {name[:128]!r} is not served here; this is {self._model.name!r}.",
                    param="model",
                )
            )
        return web.json_response(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "kvplane",
            "max_model_len": state.max_model_tokens(self._engine.state()),
        }

    async def health(self, _: web.Request) -> web.Response:
        """``GET /health``: readiness; 500 where this process has to be started anew for it."""
        if (hung := self._engine.hung()) is not None:
            return health.hangs(hung)
        known = self._engine.state()
        if self.draining:
            return health.answer("The engine drains.")
        if known.formed:
            return health.answer(None)
        loading = "".join(f" Rank {rank} has loaded {share:.0%}." for rank, share in sorted(known.loading.items()))
        return health.answer(f"The ring is not formed: {len(known.members)} of {known.world_size} ranks.{loading}")

    async def state(self, _: web.Request) -> web.Response:
        """``GET /state``."""
        known = state.wire(self._engine.state(), draining=self.draining, in_flight=self.in_flight)
        return web.Response(text=known.model_dump_json(by_alias=True), content_type="application/json")

    async def metrics(self, request: web.Request) -> web.Response:
        """``GET /metrics``, in the format that the scraper prefers."""
        encoder, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encoder(self._registry), headers={"Content-Type": content_type})

    async def version(self, _: web.Request) -> web.Response:
        """``GET /version``."""
        return web.json_response({"version": importlib.metadata.version("kvplane")})

    # Around every request.

    @web.middleware
    async def _middleware(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Gives every answer its request id, and every error its object."""
        given = request.headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        _request_id.set(request_id)
        try:
            response = await handler(request)
        except (BadRequestError, RejectedError) as error:
            response = error_response(error.refusal)
        except web.HTTPException as error:
            response = error_response(_from_http(error, request, self._max_body_bytes))
        except ConnectionError:
            if request.transport is not None and not request.transport.is_closing():
                raise
            return web.Response()  # to nobody, since the client has gone: raised on, aiohttp would log it as an error
        except Exception:
            log.exception("The request %s failed.", request_id)
            response = error_response(_OWN_FAULT)
        if not response.prepared:
            response.headers["x-request-id"] = request_id
        self.tally.responses[response.status] = self.tally.responses.get(response.status, 0) + 1
        return response


async def serve(api: Api, *, host: str, port: int) -> web.AppRunner:
    """Listens; the runner's ``cleanup`` ends it. Clients that go away have their handlers cancelled."""
    runner = web.AppRunner(
        api.application(), handler_cancellation=True, access_log=None, shutdown_timeout=_LINGER_SECONDS
    )
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner


def error_body(refusal: Refusal) -> dict[str, Any]:
    """``{"error": {"message", "type", "param", "code"}}``."""
    kind = "invalid_request_error"
    if refusal.status == 429:
        kind = "rate_limit_error"
    elif refusal.status >= 500:
        kind = "server_error"
    return {"error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}}


def error_response(refusal: Refusal) -> web.Response:
    """The answer that says why there is none."""
    headers = {}
    if refusal.retry_after_seconds is not None:
        headers["retry-after"] = str(refusal.retry_after_seconds)
    if refusal.reason is not None:
        headers["x-kvplane-reason"] = refusal.reason
    return web.json_response(error_body(refusal), status=refusal.status, headers=headers)


def _from_http(error: web.HTTPException, request: web.Request, max_body_bytes: int) -> Refusal:
    match error.status:
        case 404:
            return Refusal(404, "not_found", f"There is nothing at {request.path[:128]!r}; see /v1/models.")
        case 405:
            return Refusal(405, "method_not_allowed", f"{request.path[:128]!r} does not take {request.method}.")
        case 413:
            return Refusal(
                413, "body_too_large", f"The request body is larger than {max_body_bytes} bytes; send a smaller one."
            )
    return Refusal(error.status, "bad_request", f"The request cannot be served: {error.reason}.")


async def _whole(exchange: _Exchange) -> web.Response:
    async for _ in exchange.pieces():
        pass
    asked, tokenizer = exchange.asked, exchange.model.tokenizer
    choices = []
    for choice in exchange.choices:
        body: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish}
        text = "".join(choice.pieces)
        if asked.chat:
            body["message"] = {"role": "assistant", "content": text}
        else:
            body["text"] = text
        body["logprobs"] = _logprobs(asked, choice.sampled, tokenizer)
        if asked.return_token_ids:
            body["token_ids"] = choice.tokens
        choices.append(body)
    kind = "chat.completion" if asked.chat else "text_completion"
    return web.json_response(
        {
            "id": exchange.id,
            "object": kind,
            "created": exchange.created,
            "model": exchange.model.name,
            "choices": choices,
            "usage": exchange.usage(),
        }
    )


async def _stream(request: web.Request, exchange: _Exchange) -> web.StreamResponse:
    asked = exchange.asked
    response = web.StreamResponse(
        headers={
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-cache",
            "x-request-id": _request_id.get(),
        }
    )
    await response.prepare(request)
    begun: set[int] = set()
    try:
        async for piece in exchange.pieces():
            if piece is None:
                await response.write(b": waiting\n\n")
            elif isinstance(piece, Progress):
                await response.write(f": prefill {piece.computed}/{piece.prompt}\n\n".encode())
            elif piece.text or piece.finish or piece.sampled:
                await response.write(_event(_chunk(exchange, [_streamed(exchange, piece, begun)])))
        if asked.include_usage:
            await response.write(_event({**_chunk(exchange, []), "usage": exchange.usage()}))
    except RejectedError as error:
        await response.write(_event(error_body(error.refusal)))
    except ConnectionError:
        raise
    except Exception:
        log.exception("The request %s failed while it was streamed.", _request_id.get())
        await response.write(_event(error_body(_OWN_FAULT)))
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def _event(body: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _chunk(exchange: _Exchange, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "id": exchange.id,
        "object": "chat.completion.chunk" if exchange.asked.chat else "text_completion",
        "created": exchange.created,
        "model": exchange.model.name,
        "choices": list(choices),
    }


def _streamed(exchange: _Exchange, piece: _Piece, begun: set[int]) -> dict[str, Any]:
    asked, choice = exchange.asked, piece.choice
    body: dict[str, Any] = {"index": choice.index, "finish_reason": piece.finish}
    if asked.chat:
        role = {} if choice.index in begun else {"role": "assistant"}
        begun.add(choice.index)
        body["delta"] = {**role, "content": piece.text}
    else:
        body["text"] = piece.text
    placed = choice.sampled[-len(piece.sampled) :] if piece.sampled else []
    body["logprobs"] = _logprobs(asked, placed, exchange.model.tokenizer) if placed else None
    if asked.return_token_ids:
        body["token_ids"] = list(piece.tokens)
    return body


def _logprobs(
    asked: Asked, placed: Sequence[tuple[Sampled, int]], tokenizer: Tokenizer | None
) -> dict[str, Any] | None:
    if asked.sampling.logprobs is None:
        return None
    if asked.chat:
        return {"content": [_chat_logprob(sampled, tokenizer) for sampled, _ in placed]}
    return {
        "tokens": [_name(sampled.token, tokenizer) for sampled, _ in placed],
        "token_logprobs": [sampled.logprob for sampled, _ in placed],
        "top_logprobs": [{_name(token, tokenizer): value for token, value in sampled.top} for sampled, _ in placed],
        "text_offset": [offset for _, offset in placed],
    }


def _chat_logprob(sampled: Sampled, tokenizer: Tokenizer | None) -> dict[str, Any]:
    return {
        **_one_logprob(sampled.token, sampled.logprob, tokenizer),
        "top_logprobs": [_one_logprob(token, value, tokenizer) for token, value in sampled.top],
    }


def _one_logprob(token: int, value: float | None, tokenizer: Tokenizer | None) -> dict[str, Any]:
    raw = None if tokenizer is None else list(tokenizer.raw(token))
    return {"token": _name(token, tokenizer), "logprob": value, "bytes": raw}


def _name(token: int, tokenizer: Tokenizer | None) -> str:
    """A token as text; where there is no tokenizer, or the token is no text of its own, by its id, as vLLM may."""
    text = None if tokenizer is None else tokenizer.raw(token).decode(errors="replace")
    return f"token_id:{token}" if text is None else text
