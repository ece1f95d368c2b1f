"""KAITO's guard: 429 when more requests wait in vLLM than one batch holds.

Source: kaito-project/kaito, ``presets/workspace/inference/vllm/rate_limit.py`` (``RateLimitMiddleware.dispatch``) and
``inference_api.py``, which sets the threshold to the engine's ``max_num_seqs``, at
056b8280b1a8debf644bc6f4399e913a1f9c7e70. Examples in our tests: its ``tests/test_rate_limit.py``.

There it is a middleware that reads the gauge in vLLM's own process; here the gauge is as old as the scrape, and the
guard's own count of requests (which leads the gauge in a burst) is exact in both.
"""

from collections.abc import Mapping, Sequence

from bench.admission.policy import Request, Ruling, Verdict, View


class QueueDepthGuard:
    """Refuses while more requests wait than ``max_num_seqs``, by the gauge or by its own count."""

    progress_seconds = None

    def __init__(self, *, max_num_seqs: int | None = None, scrape_seconds: float = 0.1) -> None:
        """``max_num_seqs``: the threshold; None: the engine's own, as in KAITO."""
        self._max_num_seqs = max_num_seqs
        self._scrape_seconds = scrape_seconds
        self._pending = 0

    @property
    def name(self) -> str:
        return "kaito" if self._max_num_seqs is None else f"kaito {self._max_num_seqs}"

    @property
    def scrape_seconds(self) -> float | None:
        return self._scrape_seconds

    def on_arrival(self, request: Request, view: View, now: float) -> Verdict:
        threshold = view.engine.max_num_seqs if self._max_num_seqs is None else self._max_num_seqs
        gauge = 0 if view.scrape is None else view.scrape.waiting  # a missing gauge is 0 there too
        if max(gauge, self._pending - threshold) > threshold:
            return Verdict.REFUSE
        self._pending += 1
        return Verdict.PASS

    def on_first_token(self, request: Request, view: View, now: float) -> None:
        pass

    def on_progress(self, generated: Mapping[int, int], view: View, now: float) -> None:
        pass

    def on_finish(self, request: Request, output_tokens: int, view: View, now: float) -> None:
        self._pending -= 1

    def on_scrape(self, view: View, now: float) -> None:
        pass

    def on_tick(self, view: View, now: float) -> Sequence[Ruling]:
        return ()

    def next_tick_at(self, now: float) -> float | None:
        return None
