"""Streamed completions as token ids, with the moment of each: what a lost rank costs is a pause in one of these.

Greedy and without an end of its own, so that the same prompt gives the same tokens, however often the ring changes.
"""

import http.client
import itertools
import json
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Final, Self

SILENT_SECONDS: Final = 120.0
"""Longest silence on a stream before its client gives up: the engine sends a comment each 15 s."""
AGAIN_SECONDS: Final = 0.1
"""From a failed request to the next one: a client in a hurry."""
_POLL_SECONDS: Final = 0.01


@dataclass
class Answer:
    """What came of one request."""

    tokens: list[int] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    """When each token came, on the monotonic clock."""
    cached_tokens: int | None = None
    """Of the prompt, found computed; None where the answer has not ended."""
    error: str | None = None
    """Why it is not whole; None where it is, or while it is on its way."""


def ask(where: str, model: str, prompt: Sequence[int], *, count: int, into: Answer | None = None) -> Answer:
    """A completion of ``count`` tokens at ``where`` (host:port); ``into`` is filled while it comes. Never raises for
    what a server or a network does: ``error`` says it."""
    answer = into or Answer()
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    try:
        with closing(http.client.HTTPConnection(where, timeout=SILENT_SECONDS)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            with closing(connection.getresponse()) as response:
                if response.status != 200:
                    answer.error = f"{response.status}: {response.read()[:500]!r}"
                else:
                    answer.error = _read(response, answer)
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: an event was cut
        answer.error = repr(error)
    if answer.error is None and len(answer.tokens) != count:
        answer.error = f"{len(answer.tokens)} tokens came of {count}"
    return answer


def _read(response: http.client.HTTPResponse, answer: Answer) -> str | None:
    """Takes in a stream to its end; why it is not whole."""
    for line in response:
        if line.startswith(b"data: [DONE]"):
            return None
        if line.startswith(b"data: "):
            event = json.loads(line[6:])
            if "error" in event:
                return str(event["error"])
            _take(event, answer)
    return "the stream was cut: it ended without [DONE]"


def _take(event: Mapping[str, Any], answer: Answer) -> None:
    for choice in event["choices"]:
        tokens = choice.get("token_ids") or ()
        answer.tokens += tokens
        answer.at += [time.monotonic()] * len(tokens)
    if usage := event.get("usage"):
        answer.cached_tokens = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0))


def ask_until_answered(where: str, model: str, prompt: Sequence[int], *, count: int, seconds: float) -> Answer:
    """The first whole answer, asking again while there is none; the last failure where none came in time."""
    end = time.monotonic() + seconds
    while (answer := ask(where, model, prompt, count=count)).error is not None and time.monotonic() < end:
        time.sleep(AGAIN_SECONDS)
    return answer


class Asking:
    """A completion on its way, on a thread of its own; the end of the context waits for its end."""

    def __init__(self, where: str, model: str, prompt: Sequence[int], *, count: int) -> None:
        self.prompt, self.count = list(prompt), count
        self.answer = Answer()
        self._thread = threading.Thread(
            target=ask, args=(where, model, self.prompt), kwargs={"count": count, "into": self.answer}
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()

    def await_tokens(self, count: int) -> None:
        """Returns when so many have come; raises RuntimeError where the answer ends before."""
        while len(self.answer.tokens) < count:
            if not self._thread.is_alive() and len(self.answer.tokens) < count:
                raise RuntimeError(f"The answer ended after {len(self.answer.tokens)} tokens: {self.answer.error}.")
            time.sleep(_POLL_SECONDS)

    def finish(self) -> Answer:
        """The answer, once it has ended."""
        self._thread.join()
        return self.answer


@dataclass(frozen=True)
class Pause:
    """Two tokens between which nothing came."""

    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


def longest_pause(at: Sequence[float], *, after: float, begun_by: float = float("inf")) -> Pause:
    """The longest pause of a stream that ended after a moment; of those that had begun by ``begun_by``.

    Every token needs every rank, so a rank that dies at once ends the tokens at once: its pause has begun within what
    was on its way. Raises ValueError where no token came after that.
    """
    pauses = [Pause(first, second) for first, second in itertools.pairwise(at)]
    found = [pause for pause in pauses if pause.ended > after and pause.began <= begun_by]
    if not found:
        raise ValueError("No token came after the fault: the answer had ended, or ended with it.")
    return max(found, key=lambda pause: pause.seconds)
