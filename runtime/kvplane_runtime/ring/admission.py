"""What is refused at the door, and in which words: 400 for what can never fit, 429 for what does not fit now.

A request is charged the most that it may come to hold on every rank (:mod:`accounting`), so these are questions of
arithmetic. The refusal of a prompt that is too long says what it needs, what the ring holds and the ring that would do.
"""

from dataclasses import dataclass
from typing import Final

from kvplane_runtime.ring.accounting import Reserve, Tokens, decode_shares, usable, zigzag_share

_MOST_RANKS: Final = 1024
"""Largest ring that is proposed."""
_ROUNDING: Final = 2
"""Tokens by which a rank may get more when an output that is partly generated is cut over all ranks anew after a loss: decode
deals its tokens one by one, a window in pairs of pieces."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not served: an OpenAI-style error with its HTTP status."""

    status: int
    code: str
    """Stable and machine-readable, such as ``context_length_exceeded``."""
    message: str
    """Whole sentences for a human: what is wrong, and the way out."""
    param: str | None = None
    """The field of the request body that is at fault."""
    retry_after_seconds: int | None = None
    reason: str | None = None
    """What was short, in one word for ``x-kvplane-reason``, such as ``kv``."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a ring holds when it is empty."""

    ranks: int
    capacity: int
    """KV tokens of each rank."""
    reserve: Reserve
    model_tokens: int | None
    """Longest prompt + output that the model was made for; None: no bound."""
    context_tokens: int | None = None
    """Longest prompt + output that is to be served; None: no bound."""

    @property
    def longest(self) -> int | None:
        """Longest prompt + output, however large the ring; None: no bound."""
        return min((bound for bound in (self.model_tokens, self.context_tokens) if bound is not None), default=None)

    @property
    def tokens(self) -> int:
        """KV tokens that sequences in progress may take on all ranks together."""
        return self.ranks * usable(self.capacity, self.ranks, self.reserve)

    def holds(self, prompt: int, output: int, outputs: int, *, ranks: int) -> bool:
        """Whether a ring of ``ranks`` such ranks could hold the request with nothing else in it, computed anew or not."""
        most = usable(self.capacity, ranks, self.reserve)
        generated = -(-(output - 1) // ranks)
        return (zigzag_share(prompt, ranks) + generated + _ROUNDING) * outputs <= most

    def output_tokens(self, prompt: int, outputs: int, *, most: int) -> int:
        """Longest output, up to ``most``, beside which the prompt fits; at least 1."""
        bound = most if self.longest is None else min(most, self.longest - prompt)
        shortest, longest = 1, max(1, bound)
        while shortest < longest:
            middle = (shortest + longest + 1) // 2
            if self.holds(prompt, middle, outputs, ranks=self.ranks):
                shortest = middle
            else:
                longest = middle - 1
        return shortest


def demand(prompt: int, output: int, *, ranks: int) -> Tokens:
    """Most KV tokens of one output, by rank, when its prompt is cut over all ranks.

    The last token of an output is never an input, so it has no KV.
    """
    tail = decode_shares(prompt, output - 1, ranks)
    return tuple(zigzag_share(prompt, ranks) + share for share in tail)


def never_fits(prompt: int, output: int, outputs: int, room: Room) -> Refusal | None:
    """400 where the request could not be served by this ring with nothing else in it."""
    asked = f"The prompt has {prompt} tokens and the output may have {output}"
    if room.longest is not None and prompt + output > room.longest:
        bound = "the model's context is" if room.longest == room.model_tokens else "this service is set to take at most"
        return _too_long(
            f"{asked}, together {prompt + output}; {bound} {room.longest} tokens, whatever the ring. "
            "Send a shorter prompt or a lower max_tokens."
        )
    if room.holds(prompt, output, outputs, ranks=room.ranks):
        return None
    times = f", times {outputs} outputs" if outputs > 1 else ""
    kept = " beside the share of a lost rank (reserve Survive)" if room.reserve is Reserve.SURVIVE else ""
    needed = ring_size(prompt, output, outputs, room)
    larger = f"a ring of {needed} ranks would do" if needed else f"no ring of up to {_MOST_RANKS} ranks would do"
    return _too_long(
        f"{asked}{times}; this ring of {room.ranks} ranks of {room.capacity} KV tokens holds {room.tokens}{kept}, and "
        f"{larger}. Send a shorter prompt or a lower max_tokens."
    )


def too_many_outputs(outputs: int, most: int) -> Refusal:
    """400: more outputs than are ever decoded together."""
    return Refusal(
        400,
        "too_many_outputs",
        f"The request wants {outputs} outputs, and the ring serves at most {most} at a time. Send a smaller n.",
        param="n",
    )


def ring_size(prompt: int, output: int, outputs: int, room: Room) -> int | None:
    """Ranks of the smallest ring that could hold the request; None where it would need more than 1,024."""
    sizes = range(1, _MOST_RANKS + 1)
    return next((ranks for ranks in sizes if room.holds(prompt, output, outputs, ranks=ranks)), None)


def no_room(needed: Tokens, free: Tokens, retry_after_seconds: int) -> Refusal:
    """429: the request would fit if less were under way."""
    room = f"{max(0, min(free))} are free now on the fullest"
    return _not_now(f"The request may need {max(needed)} KV tokens on a rank, and {room}", retry_after_seconds)


def until_whole(ranks: int, whole: int, retry_after_seconds: int) -> Refusal:
    """429: the request fits the whole ring, and not what is there of it."""
    return _not_now(
        f"The request fits the whole ring of {whole} ranks, and only {ranks} are there now", retry_after_seconds
    )


def after_parked(retry_after_seconds: int) -> Refusal:
    """429: who lost its room with a rank goes before who comes."""
    return _not_now("Requests that lost their room with a rank go first", retry_after_seconds)


def too_many(sequences: int, retry_after_seconds: int) -> Refusal:
    """429: as many outputs as are decoded together are under way."""
    return _not_now(
        f"The ring serves at most {sequences} outputs at a time, and they are under way",
        retry_after_seconds,
        code="too_many_sequences",
        reason="requests",
    )


def parked_too_long(seconds: float, ranks: int) -> Refusal:
    """503 for a request that lost its room with a rank, and got none in time."""
    return Refusal(
        503,
        "ring_too_small",
        f"A rank was lost, the other {ranks} have no room for this request, and none came free within {seconds:g} s; "
        "retry when the ring is whole again.",
        retry_after_seconds=30,
        reason="kv",
    )


def _too_long(message: str) -> Refusal:
    return Refusal(400, "context_length_exceeded", message, param="prompt")


def _not_now(why: str, retry_after_seconds: int, *, code: str = "kv_cache_full", reason: str = "kv") -> Refusal:
    return Refusal(
        429,
        code,
        f"{why}; retry in {retry_after_seconds} s.",
        retry_after_seconds=retry_after_seconds,
        reason=reason,
    )
