"""One streamed completion as a client sees it, and the body that makes a random model answer at a given length.

The model writes gibberish and would never stop by itself, so its end is forced: the end-of-text token gets a logit bias
that wins every step, and ``min_tokens`` forbids it until the answer is as long as the mix says. The engine thus stops by
its own rules at a length that nobody could read off ``max_tokens``; whoever measures lengths (our sidecar does) sees
real ones. The other way, a client that hangs up at the right length, would hide every length from the policies.
No policy may look at ``min_tokens``.

Prompts are token ids at random, different in every run: the same lengths, and no hits in the prefix cache.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import aiohttp

from bench.admission.workload import Arrival

END_TOKEN: Final = 1
FIRST_TOKEN: Final = 5
"""Tokens below are special ones."""
VOCABULARY: Final = 8192
_USAGE: Final = b'"completion_tokens":'
_EVENT: Final = b'"choices":[{'
"""In every event with output, and not in the last one, which has the usage and no choice."""


_ERROR: Final = b'data: {"error":'
_REFUSALS: Final = (429, 503)


class RefusedError(Exception):
    """429 or 503, from the engine or from what stands before it.

    vLLM's own caps look twice: requests of one burst pass the first look, begin as streams, and get the 503 as an event.
    """


class CompletionError(Exception):
    """Any other answer than a whole stream."""


def body(arrival: Arrival, *, model: str, salt: str) -> bytes:
    """The request of one arrival; the salt decides on the prompt's tokens and nothing else."""
    random_ = random.Random(salt)
    return json.dumps(
        {
            "model": model,
            "prompt": random_.choices(range(FIRST_TOKEN, VOCABULARY), k=arrival.prompt_tokens),
            "max_tokens": arrival.max_tokens,
            "min_tokens": arrival.output_tokens - 1,  # the end-of-text token is one more
            "logit_bias": {str(END_TOKEN): 100},
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()


@dataclass
class Progress:
    """How far one completion is; times on the clock of the caller."""

    tokens: int = 0
    """Events so far, each of one token or now and then of several; exact at the end, from the engine's own count."""
    first_token: float | None = None
    last_token: float | None = None


async def complete(
    session: aiohttp.ClientSession,
    url: str,
    body_: bytes,
    *,
    output_tokens: int,
    clock: Callable[[], float],
    progress: Progress,
    on_tokens: Callable[[int], None],
) -> None:
    """Sends it and reads to the end; ``on_tokens`` gets the count so far whenever it has grown.

    Raises RefusedError, or CompletionError (or what aiohttp raises) if anything but a whole stream came back.
    """
    async with session.post(url, data=body_, headers={"Content-Type": "application/json"}) as answer:
        if answer.status in _REFUSALS:
            raise RefusedError
        if answer.status != 200:
            raise CompletionError(f"{answer.status}: {(await answer.text())[:300]}")
        rest, done, exact = b"", False, None
        async for piece in answer.content.iter_any():
            lines, _, rest = (rest + piece).rpartition(b"\n")
            done = done or b"data: [DONE]" in lines
            exact = counted(lines) or exact
            if (at := lines.find(_ERROR)) >= 0:
                error = json.loads(lines[at:].split(b"\n", 1)[0].removeprefix(b"data: "))["error"]
                raise RefusedError if error["code"] in _REFUSALS else CompletionError(error["message"])
            if events := lines.count(_EVENT):
                progress.last_token = clock()
                if progress.first_token is None:
                    progress.first_token = progress.last_token
                progress.tokens += events
                on_tokens(progress.tokens)
        if not done or exact != output_tokens:
            raise CompletionError(f"The stream ended after {exact or progress.tokens} of {output_tokens} tokens.")
        progress.tokens = exact


def counted(lines: bytes) -> int | None:
    """The usage's ``completion_tokens`` in whole lines of a stream; None where they have no usage."""
    at = lines.rfind(_USAGE)
    if at < 0:
        return None
    digits = lines[at + len(_USAGE) :][:12].lstrip()
    return int(digits[: len(digits) - len(digits.lstrip(b"0123456789"))])
