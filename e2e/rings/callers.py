"""Clients of one ring that ask for one answer after the other: for faults that take their time, or come when they like."""

import threading
from dataclasses import dataclass, field
from typing import Final, Self

from e2e.cluster.errors import ApiError
from e2e.rings.drill import Work
from e2e.rings.ring import Ring
from e2e.rings.streams import AGAIN_SECONDS, Answer, ask, longest_pause
from e2e.tests.sidecar import eventually
from kvplane_api import names

Asked = tuple[list[int], Answer]
"""A prompt, and what came of it."""
_FIRST_TOKEN_SECONDS: Final = 60


@dataclass
class Caller:
    """Asks the sidecar of a ring's rank 0 while in the context; the answer that is under way at its end is waited for.

    What is refused is asked for again, as clients do.
    """

    ring: Ring
    work: Work
    seed: int
    """Of the first prompt; each has its own."""
    asked: list[Asked] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self._leader = self._leader_uid()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def await_tokens(self) -> None:
        """Returns when an answer is on its way."""
        eventually(
            lambda: any(answer.tokens for _, answer in self.asked),
            seconds=_FIRST_TOKEN_SECONDS,
            otherwise=lambda: f"no token has come: {[answer.error for _, answer in self.asked]}",
        )

    def whole(self) -> list[Asked]:
        """Prompts and answers that came to their end."""
        return [(prompt, answer) for prompt, answer in self.asked if answer.error is None]

    def cut(self) -> list[str]:
        """Why answers that had begun did not."""
        return [answer.error for _, answer in self.asked if answer.error is not None and answer.tokens]

    def longest_pause(self) -> float:
        """Seconds, inside of a whole answer; raises ValueError where there is none."""
        return max(longest_pause(answer.at, after=0.0).seconds for _, answer in self.whole())

    def leader_stayed(self) -> bool:
        """Whether rank 0 is the pod that it was at the beginning."""
        return self._leader_uid() == self._leader

    def _leader_uid(self) -> str:
        return str(self.ring.pod(0)["metadata"]["uid"])

    def _run(self) -> None:
        seed = self.seed
        while not self._stop.is_set():
            prompt, answer = self.work.prompt(seed), Answer()
            seed += 1
            try:
                where = f"{self.ring.pod(0)['status']['podIP']}:{names.PORT_SERVING}"
            except (ApiError, KeyError, OSError):  # rank 0 is being made again, or the API server is busy
                self._stop.wait(AGAIN_SECONDS)
                continue
            self.asked.append((prompt, answer))
            ask(where, self.ring.service, prompt, count=self.work.output_tokens, into=answer)
            if answer.error is not None:
                self._stop.wait(AGAIN_SECONDS)
