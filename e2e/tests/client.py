"""A client of the OpenAI API as users write it, and one that counts what it loses."""

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from e2e.stack import Stack


def address(stack: Stack, namespace: str, service: str) -> str:
    """host:port of the service's ClusterIP, which this host reaches through the cluster's own network."""
    found = stack.get(namespace, "service", service)
    return f"{found['spec']['clusterIP']}:8000"


def complete(where: str, model: str, prompt: str = "Hello", *, max_tokens: int = 8, **more: Any) -> dict[str, Any]:
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
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        with closing(connection.getresponse()) as answer:
            assert answer.status == 200, f"{answer.status}: {answer.read()[:500]!r}"
            yield answer


@dataclass
class Load:
    """Streams one after another, from several threads, until stopped. A new connection each time, Retry-After obeyed once."""

    where: str
    model: str
    workers: int = 2
    max_tokens: int = 64
    done: int = 0
    lost: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "Load":
        self._threads = [threading.Thread(target=self._run) for _ in range(self.workers)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                pieces = list(stream(self.where, self.model, max_tokens=self.max_tokens))
                if len(pieces) < 2:
                    self.lost.append(f"{time.strftime('%T')} only {len(pieces)} pieces")
                self.done += 1
            except (OSError, AssertionError, http.client.HTTPException) as error:
                self.lost.append(f"{time.strftime('%T')} {error!r}")
                time.sleep(0.2)
