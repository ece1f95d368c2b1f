"""What became of the promises in ``slo``, request by request: goodput as a signal of the running service.

Each generating request is judged once, when it is over, with the definition that ``bench/admission`` measures by: it is
met if its answer came whole, its first token within ``ttftMilliseconds`` of its arrival here, and the tokens after it
within ``tpotMilliseconds`` each on average. An answer that is not streamed shows its client neither time, so its whole is
held against both together: ttft + (tokens - 1) x tpot.

A request has arrived when its body is there and read, as for admission's own deadline. Judged is only what is known. Left out
are requests whose client went away before the first token was known to be late, those that the client got wrong (4xx), and
answers whose tokens nobody counted.
"""

from collections import Counter
from enum import StrEnum
from typing import Final

from kvplane_api.wire import PromisesState, SloConfig
from kvplane_runtime.histogram import Buckets

_TTFT_BOUNDS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
"""vLLM's buckets, so that this histogram and the engine's can be laid over each other."""


class Result(StrEnum):
    """What became of one request; the values of the metric's label. Of several reasons the first in this order counts."""

    MET = "met"
    REFUSED = "refused"
    """For lack of room: 429 of ours, or 429 or 503 of the engine."""
    FAILED = "failed"
    """Another 5xx, an answer that was cut or had no token in it, or no engine to ask."""
    TTFT_MISSED = "ttft-missed"
    """The first token came too late; or it must have, as the request was let through too late."""
    TPOT_MISSED = "tpot-missed"
    """The tokens after the first came too slowly."""
    TOTAL_MISSED = "total-missed"
    """The answer, not streamed, took longer than both promises together allow: which one it broke is not known."""


_BROKEN: Final = (Result.TTFT_MISSED, Result.TPOT_MISSED, Result.TOTAL_MISSED)


class Promises:
    """Results counted so far, and the times to the first token."""

    def __init__(self) -> None:
        self.results: Counter[Result] = Counter()
        self.first_token_seconds = Buckets(_TTFT_BOUNDS)
        """From arrival here to the first token, of streamed answers: of the others it is not known."""

    def state(self) -> PromisesState:
        """What the autoscaler learns from. What was refused or failed is no answer."""
        return PromisesState(
            kept_total=self.results[Result.MET], broken_total=sum(self.results[each] for each in _BROKEN)
        )


def judged(
    slo: SloConfig, *, let_through: float, first_token: float | None, total: float, tokens: float | None
) -> Result | None:
    """The result of an answer that came whole; None where too little is known.

    Times are seconds from the request's arrival: until it was let through to the engine, until its first token (None: not
    streamed), until its end. ``tokens``: of each output; None: not counted.
    """
    ttft, tpot = slo.ttft_milliseconds / 1000, slo.tpot_milliseconds / 1000
    if (let_through if first_token is None else first_token) > ttft:
        return Result.TTFT_MISSED
    if tokens is None:
        return None
    if first_token is None:
        return Result.MET if total <= ttft + max(0.0, tokens - 1) * tpot else Result.TOTAL_MISSED
    per_token = (total - first_token) / (tokens - 1) if tokens > 1 else 0.0
    return Result.MET if per_token <= tpot else Result.TPOT_MISSED
