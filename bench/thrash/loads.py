"""What the users of the modelled engine do. Each load is a plan of arrivals that reacts to the answers.

Texts are numbers: two requests with the same number have the same text up to the shorter one's length, which is what a
prefix cache lives on.
"""

import heapq
import itertools
import random
from collections.abc import Callable
from typing import Final, Protocol

from bench.thrash.model import Request

Users = Callable[[float], float]
"""How many users there are, or requests per second, by time in seconds."""

CHAT_TOKENS: Final = 2000
"""A conversation that grew beyond this begins anew."""
MEAN_CHAT_TOKENS: Final = 1100
_texts: Final = itertools.count()
"""New texts, different in all loads."""


class Load(Protocol):
    """Arrivals."""

    def due(self, now: float) -> list[Request]:
        """Requests that have arrived since the last call."""

    def completed(self, request: Request, now: float) -> None:
        """An answer is complete."""


class Chats:
    """Conversations: each turn's prompt is the whole conversation so far, and a user thinks between turns."""

    def __init__(self, *, users: Users, think_seconds: float, random_: random.Random) -> None:
        self._users = users
        self._think_seconds = think_seconds
        self._random = random_
        self._present = 0
        self._turns: list[tuple[float, int, int]] = []
        """Time of the next turn, text, tokens so far."""

    def due(self, now: float) -> list[Request]:
        while self._present < self._users(now):
            self._present += 1
            self._later(now, next(_texts), 0)
        found = []
        while self._turns and self._turns[0][0] <= now:
            _, text, tokens = heapq.heappop(self._turns)
            if self._present > self._users(now):
                self._present -= 1
                continue
            if tokens > CHAT_TOKENS:
                text, tokens = next(_texts), 0
            prompt = tokens + self._random.randint(50, 150)
            found.append(Request(text=text, prompt_tokens=prompt, output_tokens=self._random.randint(50, 150)))
        return found

    def completed(self, request: Request, now: float) -> None:
        self._later(now, request.text, request.tokens)

    def _later(self, now: float, text: int, tokens: int) -> None:
        heapq.heappush(self._turns, (now + self._random.expovariate(1 / self._think_seconds), text, tokens))


class OneShots:
    """Prompts that have nothing in common, from clients that send the next when they have their answer."""

    def __init__(
        self,
        *,
        clients: Users,
        prompt_tokens: tuple[int, int],
        output_tokens: tuple[int, int],
        think_seconds: float,
        random_: random.Random,
    ) -> None:
        self._clients = clients
        self._prompt_tokens = prompt_tokens
        self._output_tokens = output_tokens
        self._think_seconds = think_seconds
        self._random = random_
        self._present = 0
        self._next: list[float] = []

    def due(self, now: float) -> list[Request]:
        while self._present < self._clients(now):
            self._present += 1
            self._later(now)
        found = []
        while self._next and self._next[0] <= now:
            heapq.heappop(self._next)
            if self._present > self._clients(now):
                self._present -= 1
                continue
            found.append(
                Request(
                    text=next(_texts),
                    prompt_tokens=self._random.randint(*self._prompt_tokens),
                    output_tokens=self._random.randint(*self._output_tokens),
                )
            )
        return found

    def completed(self, request: Request, now: float) -> None:
        del request
        self._later(now)

    def _later(self, now: float) -> None:
        heapq.heappush(self._next, now + self._random.expovariate(1 / self._think_seconds))


class Questions:
    """Questions about documents: some documents are asked about much more than others (Zipf), at a Poisson rate."""

    def __init__(
        self, *, per_second: Users, documents: int, document_tokens: int, zipf: float, random_: random.Random
    ) -> None:
        self._per_second = per_second
        self._document_tokens = document_tokens
        self._random = random_
        self._documents = [next(_texts) for _ in range(documents)]
        self._weights = list(itertools.accumulate(1 / rank**zipf for rank in range(1, documents + 1)))
        self._next = 0.0

    def due(self, now: float) -> list[Request]:
        found = []
        while self._next <= now:
            rate = self._per_second(self._next)
            self._next += self._random.expovariate(rate) if rate else 1.0
            if rate:
                found.append(
                    Request(
                        text=next(_texts),
                        prompt_tokens=self._document_tokens + self._random.randint(20, 80),
                        output_tokens=self._random.randint(30, 90),
                        shared=self._random.choices(self._documents, cum_weights=self._weights)[0],
                        shared_tokens=self._document_tokens,
                    )
                )
        return found

    def completed(self, request: Request, now: float) -> None:
        """Nobody waits for the answer."""


class Together:
    """Several loads on one engine."""

    def __init__(self, *loads: Load) -> None:
        self._loads = loads
        self._owners: dict[Request, Load] = {}

    def due(self, now: float) -> list[Request]:
        found = []
        for load in self._loads:
            for request in load.due(now):
                self._owners[request] = load
                found.append(request)
        return found

    def completed(self, request: Request, now: float) -> None:
        self._owners.pop(request).completed(request, now)
