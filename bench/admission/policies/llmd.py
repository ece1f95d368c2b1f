"""Flow control of the inference gateway (llm-d's router, formerly the endpoint picker of the Gateway API extension).

Source: llm-d/llm-d-router at ebab687927f5331c1b39defcb579a07951bce56c: the detectors in
``pkg/epp/framework/plugins/flowcontrol/saturationdetector/{utilization,concurrency}``, the token accounting in
``pkg/epp/framework/plugins/requestcontrol/dataproducer/inflightload``, and the dispatch in
``pkg/epp/flowcontrol/controller/internal/processor.go``. Examples in our tests: the ``*_test.go`` files beside them.

One endpoint, one priority. Requests wait first in, first out, and once a millisecond the head is dispatched unless the
pool is saturated (>= 1). The queue's time limit is 60 s by default; with a goal for the first token of a fraction of
that, every request would be late, so the limit is an argument, and runs use the goal. Expired requests leave the queue at
once here; there, a sweep once a second finds them. 0 is the older admission for sheddable requests: refuse, never hold.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from bench.admission.policies.held import HeldRequests
from bench.admission.policy import Request, Ruling, Scrape, Verdict, View

SATURATED = 1.0
DISPATCH_SECONDS = 0.001
"""Between two dispatches: the ticker of the processor's loop."""
REFRESH_SECONDS = 0.05
"""``--refresh-metrics-interval``."""
OUTPUT_RATIO = 1.5
"""``DefaultOutputRatio``: output tokens expected for each prompt token."""


def estimate_output(
    prompt_tokens: int, max_tokens: int | None, *, ratio: float = OUTPUT_RATIO, cap: int | None = None
) -> int:
    """Output tokens expected of a request (``SimpleTokenEstimator.EstimateOutput``); negative bounds count as none."""
    if prompt_tokens <= 0:
        return 0
    bounds = [bound for bound in (max_tokens, cap) if bound is not None and bound >= 0]
    return min([math.floor(prompt_tokens * ratio + 0.5), *bounds])  # Go rounds halves up, Python to even


class Detector(Protocol):
    """How full the endpoint is; told of every request that is dispatched."""

    @property
    def name(self) -> str: ...

    @property
    def scrape_seconds(self) -> float | None: ...

    def saturation(self, scrape: Scrape | None, now: float) -> float:
        """From 0; SATURATED and above holds requests back."""

    def dispatched(self, request: Request) -> None: ...

    def first_token(self, request: Request) -> None: ...

    def finished(self, request: Request) -> None: ...


class UtilizationDetector:
    """The default: the fuller of the engine's queue and its KV cache, as of the last scrape; blind is full."""

    def __init__(
        self,
        *,
        queue_depth: int = 5,
        kv_cache_utilization: float = 0.8,
        staleness_seconds: float = 0.2,
        scrape_seconds: float = REFRESH_SECONDS,
    ) -> None:
        self._queue_depth = queue_depth
        self._kv_cache_utilization = kv_cache_utilization
        self._staleness_seconds = staleness_seconds
        self._scrape_seconds = scrape_seconds

    @property
    def name(self) -> str:
        return f"utilization {self._kv_cache_utilization:g}/{self._queue_depth}"

    @property
    def scrape_seconds(self) -> float | None:
        return self._scrape_seconds

    def saturation(self, scrape: Scrape | None, now: float) -> float:
        if scrape is None or now - scrape.taken_at > self._staleness_seconds:
            return SATURATED
        return max(scrape.waiting / self._queue_depth, scrape.kv_cache_usage / self._kv_cache_utilization)

    def dispatched(self, request: Request) -> None:
        pass

    def first_token(self, request: Request) -> None:
        pass

    def finished(self, request: Request) -> None:
        pass


class ConcurrencyDetector:
    """Requests or estimated tokens in flight over a fixed limit; sees nothing of the engine.

    Tokens of the prompt count until the first token, tokens of the expected output (where they are counted) until the
    end, as the producer releases them for streamed responses.
    """

    scrape_seconds = None

    def __init__(
        self,
        *,
        mode: Literal["requests", "tokens", "hybrid"] = "requests",
        max_concurrency: int = 100,
        max_token_concurrency: int = 1_000_000,
        add_estimated_output_tokens: bool = False,
        output_ratio: float = OUTPUT_RATIO,
    ) -> None:
        self._mode = mode
        self._max_concurrency = max_concurrency
        self._max_token_concurrency = max_token_concurrency
        self._add_output = add_estimated_output_tokens
        self._output_ratio = output_ratio
        self._inputs: dict[int, int] = {}
        self._outputs: dict[int, int] = {}
        self._tokens = 0
        """Sum of both."""

    @property
    def name(self) -> str:
        limits = {
            "requests": f"{self._max_concurrency}",
            "tokens": f"{self._max_token_concurrency}",
            "hybrid": f"{self._max_concurrency}/{self._max_token_concurrency}",
        }
        return f"{self._mode} {limits[self._mode]}{' with output' if self._add_output else ''}"

    def saturation(self, scrape: Scrape | None, now: float) -> float:
        requests = len(self._outputs) / self._max_concurrency
        tokens = self._tokens / self._max_token_concurrency
        return {"requests": requests, "tokens": tokens, "hybrid": max(requests, tokens)}[self._mode]

    def dispatched(self, request: Request) -> None:
        self._inputs[request.id] = request.prompt_tokens
        self._outputs[request.id] = (
            estimate_output(request.prompt_tokens, request.max_tokens, ratio=self._output_ratio)
            if self._add_output
            else 0
        )
        self._tokens += self._inputs[request.id] + self._outputs[request.id]

    def first_token(self, request: Request) -> None:
        self._tokens -= self._inputs.pop(request.id, 0)

    def finished(self, request: Request) -> None:
        self._tokens -= self._inputs.pop(request.id, 0) + self._outputs.pop(request.id, 0)


class FlowControl:
    """The queue in front of a detector."""

    progress_seconds = None

    def __init__(self, detector: Detector, *, limit_seconds: float) -> None:
        """``limit_seconds``: longest wait (``defaultRequestTTL``); 0 refuses instead of holding."""
        self._detector = detector
        self._may_hold = limit_seconds > 0
        self._held = HeldRequests(limit_seconds=limit_seconds)
        self._dispatched_at = -math.inf
        self._saturated = False
        """As of the last look: only another callback can end it, so no time need be watched."""

    @property
    def name(self) -> str:
        return f"gateway {self._detector.name}"

    @property
    def scrape_seconds(self) -> float | None:
        return self._detector.scrape_seconds

    def on_arrival(self, request: Request, view: View, now: float) -> Verdict:
        if not self._held and self._detector.saturation(view.scrape, now) < SATURATED:
            self._dispatched_at = now
            self._detector.dispatched(request)
            return Verdict.PASS
        if not self._may_hold:
            return Verdict.REFUSE
        self._held.add(request)
        return Verdict.HOLD

    def on_first_token(self, request: Request, view: View, now: float) -> None:
        self._detector.first_token(request)

    def on_progress(self, generated: Mapping[int, int], view: View, now: float) -> None:
        pass

    def on_finish(self, request: Request, output_tokens: int, view: View, now: float) -> None:
        self._detector.finished(request)

    def on_scrape(self, view: View, now: float) -> None:
        pass

    def on_tick(self, view: View, now: float) -> Sequence[Ruling]:
        rulings = self._held.refuse_expired(now)
        head = self._held.head()
        self._saturated = self._detector.saturation(view.scrape, now) >= SATURATED
        if head is not None and not self._saturated and now >= self._dispatched_at + DISPATCH_SECONDS:
            self._dispatched_at = now
            self._detector.dispatched(head)
            rulings.append(self._held.take())
        return rulings

    def next_tick_at(self, now: float) -> float | None:
        expiry = self._held.expires_at()
        if expiry is None or self._saturated:
            return expiry
        return min(expiry, self._dispatched_at + DISPATCH_SECONDS)
