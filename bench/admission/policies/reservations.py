"""Reservations: KV memory set aside for a request's expected or allowed length; it waits until that much is free.

None of them looks at the engine. Each waits first in, first out; the wait is bounded by an argument (the goal for the
first token in runs), where the sources bound the number of requests instead. A request that alone exceeds the capacity
passes when nothing else is in flight; the sources refuse such a configuration at start.

Sources:

- **prompt x 1.5**: ``SimpleTokenEstimator`` of llm-d/llm-d-router (``llmd.estimate_output``): prompt + 1.5 x prompt.
- **prompt + 1024**: ModelTC/lightllm at fc72ffab9a3455cfb571f22d45ab777cc29de0de,
  ``lightllm/server/router/req_queue/chunked_prefill/impl.py`` (the peak) and ``lightllm/server/core/objs/req.py``
  (``NormalReq.get_tuple_tokens``): while the router is not busy, 1024 or 1.1 x the output so far, whichever is more.
  The repository has no test of it; the examples in ours are computed by hand from its formula.
- **prompt + max_tokens**: huggingface/text-generation-inference at db931fcf42da018a3657580c64bf2720f167f9ab,
  ``backends/v3/src/{queue,block_allocator,radix}.rs``: whole blocks for prompt + max_new_tokens - 1. Examples in our
  tests: the allocator tests in ``radix.rs``. LightLLM's default (``router_token_ratio`` 0: always busy) is the same idea.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.admission.policies.held import HeldRequests
from bench.admission.policies.llmd import estimate_output
from bench.admission.policy import Engine, Request, Ruling, Verdict, View


@dataclass
class Running:
    """A request that was let through."""

    request: Request
    generated: int = 0


Need = Callable[[Sequence[Running], Engine], int]
"""KV tokens that these requests need together."""


def prompt_and_ratio(running: Sequence[Running], engine: Engine) -> int:
    """Prompt and 1.5 x prompt of output, at most what the client allows."""
    requests = [each.request for each in running]
    return sum(
        request.prompt_tokens + estimate_output(request.prompt_tokens, request.max_tokens) for request in requests
    )


def prompt_and_maximum(running: Sequence[Running], engine: Engine) -> int:
    """Whole blocks for prompt and all the output that the client allows, but for the last token, which needs none."""
    blocks = sum(
        -(-(each.request.prompt_tokens + allowed_output(each.request, engine) - 1) // engine.block_size)
        for each in running
    )
    return blocks * engine.block_size


ADDED_OUTPUT = 6
"""LightLLM's allowance for steps that its router does not see in time (``ADDED_OUTPUT_LEN``)."""


def prompt_and_fixed(running: Sequence[Running], engine: Engine, *, output: int = 1024) -> int:
    """LightLLM's peak: the largest need while requests end one after another, each at its expected output.

    One more than the peak, which there must stay below the capacity, not reach it.
    """
    pairs = [_held_and_left(each, engine, output) for each in running]
    peak = held = 0
    for rank, (now, left) in enumerate(sorted(pairs, key=lambda pair: -pair[1]), start=1):
        held += now
        peak = max(peak, left * rank + held)
    return peak + 1


def _held_and_left(running: Running, engine: Engine, output: int) -> tuple[int, int]:
    request, generated = running.request, running.generated
    expected = min(allowed_output(request, engine), max(int(1.1 * generated), output))
    return request.prompt_tokens + generated + 1, max(0, expected - generated - 1) + ADDED_OUTPUT


def allowed_output(request: Request, engine: Engine) -> int:
    """Output tokens that the client allows; without a bound, what the context has room for."""
    room = engine.max_model_len - request.prompt_tokens
    return room if request.max_tokens is None else min(request.max_tokens, room)


class Reservation:
    """Lets requests through, in order, while all of them together need no more than the KV cache holds."""

    scrape_seconds = None

    def __init__(self, name: str, need: Need, *, limit_seconds: float, progress_seconds: float | None = None) -> None:
        """``progress_seconds``: how often ``need`` wants to know what was generated; None where it does not."""
        self._name = name
        self._need = need
        self._progress_seconds = progress_seconds
        self._held = HeldRequests(limit_seconds=limit_seconds)
        self._running: dict[int, Running] = {}

    @property
    def name(self) -> str:
        return self._name

    @property
    def progress_seconds(self) -> float | None:
        return self._progress_seconds

    def on_arrival(self, request: Request, view: View, now: float) -> Verdict:
        if not self._held and self._fits(request, view.engine):
            self._running[request.id] = Running(request)
            return Verdict.PASS
        self._held.add(request)
        return Verdict.HOLD

    def on_first_token(self, request: Request, view: View, now: float) -> None:
        pass

    def on_progress(self, generated: Mapping[int, int], view: View, now: float) -> None:
        for request, tokens in generated.items():
            self._running[request].generated = tokens

    def on_finish(self, request: Request, output_tokens: int, view: View, now: float) -> None:
        del self._running[request.id]

    def on_scrape(self, view: View, now: float) -> None:
        pass

    def on_tick(self, view: View, now: float) -> Sequence[Ruling]:
        rulings = self._held.refuse_expired(now)
        while (head := self._held.head()) is not None and self._fits(head, view.engine):
            self._running[head.id] = Running(head)
            rulings.append(self._held.take())
        return rulings

    def next_tick_at(self, now: float) -> float | None:
        return self._held.expires_at()

    def _fits(self, request: Request, engine: Engine) -> bool:
        capacity = (engine.blocks - 1) * engine.block_size  # one is the null block
        return not self._running or self._need([*self._running.values(), Running(request)], engine) <= capacity


def reserve_ratio(*, limit_seconds: float) -> Reservation:
    """prompt x 1.5."""
    return Reservation("reserve prompt x 1.5", prompt_and_ratio, limit_seconds=limit_seconds)


def reserve_fixed(*, limit_seconds: float) -> Reservation:
    """prompt + 1024."""
    return Reservation("reserve prompt + 1024", prompt_and_fixed, limit_seconds=limit_seconds, progress_seconds=0.1)


def reserve_maximum(*, limit_seconds: float) -> Reservation:
    """prompt + max_tokens."""
    return Reservation("reserve prompt + max_tokens", prompt_and_maximum, limit_seconds=limit_seconds)
