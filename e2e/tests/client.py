"""Clients of the OpenAI API as users write them: one that asks once, and callers that ask on and on and count what they get.

A caller reconnects when the server has closed its idle connection, and comes back when a refusal says when: up to twice
unless told otherwise, as OpenAI's own clients do. Its request is lost when a stream is cut, when anything but 200 and 429
comes back, and when a server takes it and gives no answer. Drains are judged by callers that come back once.
"""

import http.client
import json
import random
import select
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from e2e.stack import Stack

FIRST_TOKEN: Final = 5
"""Ids below are the demo model's special tokens."""
VOCABULARY: Final = 8192
RETRIES: Final = 2
"""Of a refused request: what OpenAI's clients do by default."""
CROSSING_SECONDS: Final = 0.1
"""In which a request that crosses with the end of its idle connection comes to nothing; one that was taken up is there longer."""
_HEADERS: Final = {"Content-Type": "application/json"}


def address(stack: Stack, namespace: str, service: str) -> str:
    """host:port of the service's ClusterIP, which this host reaches through the cluster's own network."""
    found = stack.get(namespace, "service", service)
    return f"{found['spec']['clusterIP']}:8000"


def tokens(count: int, *, seed: int | None = None) -> list[int]:
    """A prompt of that many tokens, at random: no other prompt begins like it, unless it has the same seed."""
    return random.Random(seed).choices(range(FIRST_TOKEN, VOCABULARY), k=count)  # noqa: S311  tokens, not secrets


def complete(
    where: str, model: str, prompt: str | list[int] = "Hello", *, max_tokens: int = 8, **more: Any
) -> dict[str, Any]:
    """One completion; raises on anything but 200."""
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **more}
    with _post(where, body) as answer:
        result: dict[str, Any] = json.loads(answer.read())
    return result


def stream(where: str, model: str, prompt: str = "Hello", *, max_tokens: int = 8) -> Iterator[str]:
    """The pieces of a streamed completion; raises if the stream ends without its [DONE]."""
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    with _post(where, body) as answer:
        for line in answer:
            if line.strip() == b"data: [DONE]":
                return
            if line.startswith(b"data: "):
                yield json.loads(line[6:])["choices"][0]["text"]
    raise AssertionError("the stream was cut: it ended without [DONE]")


@contextmanager
def _post(where: str, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
    """A completion's answer on a connection of its own; an AssertionError with the error's text if it is not 200."""
    with closing(http.client.HTTPConnection(where, timeout=60)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), _HEADERS)
        with closing(connection.getresponse()) as answer:
            assert answer.status == 200, f"{answer.status}: {answer.read()[:500]!r}"
            yield answer


@dataclass(frozen=True)
class Refusal:
    """A 429 as the caller got it."""

    headers: Mapping[str, str]
    """Names in lower case."""
    body: Mapping[str, Any]

    @property
    def retry_after(self) -> int:
        """Seconds to wait; raises KeyError or ValueError where the refusal does not say."""
        return int(self.headers["retry-after"])


@dataclass(frozen=True)
class Answered:
    """A request that got its whole answer; moments of the monotonic clock."""

    asked: float
    """When it was asked for first: refusals and waits come after it."""
    first: float
    """When the first token came."""
    ended: float
    tokens: int
    """Of the answer."""


@dataclass
class Load:
    """Callers that stream completions one after another, as long as the context lasts.

    Every second one keeps its connection between requests; the others make a new one each time.
    """

    where: str
    model: str
    workers: int = 2
    prompt_tokens: int = 8
    max_tokens: int = 64
    min_tokens: int | None = None
    """Each request asks for a length of its own from here to `max_tokens`; None: for `max_tokens`."""
    pause_seconds: float = 0.0
    """Of each caller, between an answer and its next request."""
    retries: int = RETRIES
    """Of each refused request."""
    answers: list[Answered] = field(default_factory=list)
    """Those that came whole, as they came."""
    refusals: list[Refusal] = field(default_factory=list)
    came_back: int = 0
    """Requests that were refused, and asked again when Retry-After said, up to `retries` times ..."""
    got_in: int = 0
    """... and those of them that had their answer then."""
    lost: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    @property
    def done(self) -> int:
        """How many whole answers came."""
        return len(self.answers)

    @property
    def seconds(self) -> list[float]:
        """From each request to the end of its answer, refusals and waits included."""
        return [round(each.ended - each.asked, 2) for each in self.answers]

    def __enter__(self) -> "Load":
        self._threads = [threading.Thread(target=self._run, args=(bool(n % 2),)) for n in range(self.workers)]
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """No caller asks for more; what is under way goes on to its end."""
        self._stop.set()

    def __exit__(self, *_: object) -> None:
        self.stop()
        for thread in self._threads:
            thread.join()

    def _run(self, keep: bool) -> None:
        connection = http.client.HTTPConnection(self.where, timeout=120)
        with closing(connection):
            while not self._stop.is_set():
                try:
                    self._turn(connection)
                except (OSError, AssertionError, KeyError, ValueError, http.client.HTTPException) as error:
                    self.lost.append(f"{time.strftime('%T')} {error!r}")
                    connection.close()
                    self._stop.wait(0.2)
                if not keep:
                    connection.close()
                self._stop.wait(self.pause_seconds)

    def _turn(self, connection: http.client.HTTPConnection) -> None:
        """One request, and again while it is refused."""
        asked, wanted, tries = time.monotonic(), self._wanted(), 1
        while isinstance(came := _ask(connection, json.dumps(wanted).encode()), Refusal):
            self.refusals.append(came)
            connection.close()  # another replica may have room
            if tries > self.retries:
                self.came_back += 1
                return
            if self._stop.wait(came.retry_after):
                return
            tries += 1
        self.answers.append(Answered(asked, came, time.monotonic(), wanted["max_tokens"]))
        if tries > 1:
            self.came_back += 1
            self.got_in += 1

    def _wanted(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": tokens(self.prompt_tokens),
            "max_tokens": random.randint(self.min_tokens or self.max_tokens, self.max_tokens),  # noqa: S311  lengths, not secrets
            "ignore_eos": True,
            "stream": True,
        }


def _ask(connection: http.client.HTTPConnection, body: bytes) -> Refusal | float:
    """Reads a whole stream, and says when its first token came; or says how it was refused. Raises if neither comes."""
    with closing(_send(connection, body)) as answer:
        if answer.status == 429:
            return Refusal({name.lower(): value for name, value in answer.getheaders()}, json.loads(answer.read()))
        assert answer.status == 200, f"{answer.status}: {answer.read()[:500]!r}"
        first, last = 0.0, b""
        for line in answer:
            if line.startswith(b"data: [DONE]"):
                answer.read()  # to its end, so that the connection can be used again
                reason = json.loads(last[6:])["choices"][0]["finish_reason"]
                assert reason == "length", f"the stream ended before its last token: {reason}"
                return first
            if line.startswith(b"data: "):
                first, last = first or time.monotonic(), line
    raise AssertionError("the stream was cut: it ended without [DONE]")


def _send(connection: http.client.HTTPConnection, body: bytes) -> http.client.HTTPResponse:
    """The head of an answer; on a new connection if the server has closed the one that was kept.

    That is seen before the connection is used, or else the server closes it while the request is on its way (RFC 9112,
    section 9.5): then the request was nobody's, and is sent again. A server that took it up and dropped it has lost it.
    """
    if connection.sock is not None and _ended(connection.sock):
        connection.close()
    kept, sent_at = connection.sock is not None, time.monotonic()
    try:
        return _request(connection, body)
    except (ConnectionResetError, BrokenPipeError):
        if not kept or time.monotonic() - sent_at > CROSSING_SECONDS:
            raise
        connection.close()
        return _request(connection, body)


def _ended(idle: socket.socket) -> bool:
    """Whether the other side has closed a connection on which nothing is awaited: what can be read of it is its end."""
    poll = select.poll()
    poll.register(idle, select.POLLIN)
    return bool(poll.poll(0))


def _request(connection: http.client.HTTPConnection, body: bytes) -> http.client.HTTPResponse:
    connection.request("POST", "/v1/completions", body, _HEADERS)
    return connection.getresponse()
