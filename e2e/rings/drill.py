"""A fault in the middle of an answer, and what it costs: the pause, the way back to N ranks, what was computed again.

The tests assert on these, and bench/ring_recovery makes its figures of them.
"""

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final

from e2e.rings.ring import WHOLE_SECONDS, Ring, await_true, restarts, serves, state_of
from e2e.rings.service import MODEL_TOKENS
from e2e.rings.streams import Answer, Asking, Pause, ask_until_answered, longest_pause

UNDER_WAY_TOKENS: Final = 20
"""Of the answer, when the fault comes."""
ON_ITS_WAY_SECONDS: Final = 0.5
"""After a fault tokens may still arrive that were there before."""
_FIRST_TOKEN: Final = 5
_VOCABULARY: Final = 8192
"""Of the demo model, whose first ids are special tokens."""


@dataclass(frozen=True)
class Work:
    """What is asked for, greedily: the same tokens from the same seed, which no other seed's prompt begins with."""

    prompt_tokens: int = 1536
    """More than a rank holds, less than two do."""
    output_tokens: int = 300
    """Enough to go on through the loss of a rank."""

    def __post_init__(self) -> None:
        if self.prompt_tokens + self.output_tokens > MODEL_TOKENS:
            raise ValueError(
                f"Prompt and output have {self.prompt_tokens + self.output_tokens} tokens, the model takes {MODEL_TOKENS}."
            )

    def prompt(self, seed: int) -> list[int]:
        """Token ids."""
        draw = random.Random(seed)  # noqa: S311  tokens, not secrets
        return draw.choices(range(_FIRST_TOKEN, _VOCABULARY), k=self.prompt_tokens)


@dataclass(frozen=True)
class Lost:
    """A rank other than 0 was hurt; seconds count from the fault."""

    prompt: list[int]
    answer: Answer
    pause: Pause
    """In the answer, that of the fault."""
    next_token_seconds: float
    """Until the token that ended the pause."""
    whole_seconds: float
    """Until the ring had all ranks again, and they were Ready."""
    recomputed_tokens: int
    placed_tokens: int
    """Of the sequence, when the fault came."""

    def recomputed_times_n(self, ranks: int) -> float:
        """Tokens computed again, as a multiple of one rank's share."""
        return ranks * self.recomputed_tokens / self.placed_tokens


@dataclass(frozen=True)
class Retried:
    """Rank 0 was hurt, its streams ended, and the client asked again; seconds count from the fault."""

    prompt: list[int]
    cut: Answer
    """What came before."""
    answer: Answer
    started_seconds: float
    """Until rank 0 was Ready: its restart, its load, and the ring."""
    answered_seconds: float
    """Until the first token of the whole answer; infinite where there is none."""
    whole_seconds: float
    """Until the ring had all ranks again, and they were Ready."""

    def recomputed_times_n(self, ranks: int) -> float:
        """Tokens of the prompt computed again, as a multiple of one rank's share."""
        cached = self.answer.cached_tokens or 0
        return ranks * (len(self.prompt) - cached) / len(self.prompt)


def lose_a_rank(ring: Ring, where: str, *, work: Work, seed: int, fault: Callable[[], object]) -> Lost:
    """``fault`` ends or silences a rank other than 0 in the midst of an answer at ``where`` (host:port), as soon as it is
    called; what it does after that may take its time.
    """
    prompt, epoch, before = work.prompt(seed), ring.epoch(), _refilled(ring)
    with Asking(where, ring.service, prompt, count=work.output_tokens) as asking:
        asking.await_tokens(UNDER_WAY_TOKENS)
        placed = len(prompt) + len(asking.answer.tokens)
        hurt = time.monotonic()
        fault()
        whole = ring.await_whole(after_epoch=epoch)
        answer = asking.finish()
    ring.await_idle()
    pause = longest_pause(answer.at, after=hurt, begun_by=hurt + ON_ITS_WAY_SECONDS)
    return Lost(
        prompt=prompt,
        answer=answer,
        pause=pause,
        next_token_seconds=pause.ended - hurt,
        whole_seconds=whole - hurt,
        recomputed_tokens=_refilled(ring) - before,
        placed_tokens=placed,
    )


def lose_rank_0(ring: Ring, where: str, *, work: Work, seed: int, fault: Callable[[], object]) -> Retried:
    """``fault`` ends the engine of rank 0 in the midst of an answer at ``where``, and the client asks again and again."""
    prompt, epoch, before = work.prompt(seed), ring.epoch(), restarts(ring.pod(0))
    with Asking(where, ring.service, prompt, count=work.output_tokens) as asking:
        asking.await_tokens(UNDER_WAY_TOKENS)
        hurt = time.monotonic()
        fault()
        cut = asking.finish()
    again = partial(ask_until_answered, where, ring.service, prompt, count=work.output_tokens, seconds=WHOLE_SECONDS)
    with ThreadPoolExecutor(max_workers=1) as client:
        asked = client.submit(again)
        await_true(
            lambda: restarts(ring.pod(0)) > before and serves(ring.pod(0)),
            what=lambda: f"Rank 0 did not come back: {state_of(ring.pod(0))}",
            seconds=WHOLE_SECONDS,
        )
        started = time.monotonic()
        whole = ring.await_whole(after_epoch=epoch)
        answer = asked.result()
    return Retried(
        prompt=prompt,
        cut=cut,
        answer=answer,
        started_seconds=started - hurt,
        answered_seconds=answer.at[0] - hurt if answer.error is None else float("inf"),
        whole_seconds=whole - hurt,
    )


def _refilled(ring: Ring) -> int:
    return int(ring.value("kvplane_ring_prefill_tokens_total", kind="refilled"))
