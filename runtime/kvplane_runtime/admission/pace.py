"""How fast the engine decodes, and how many sequences it can give the promised time per token.

Every running sequence gets one token per engine step, and a step takes the longer the more sequences share it and the
more prompt tokens are computed in it. From windows of half a second this module learns

    time per token  =  a + b * sequences + c * prompt tokens per step

(c comes from the times to first token, :mod:`prefill`). A set of requests that goes on like this, each place taken by a
like request when one ends, spends the share  sum_i  c p_i / (c p_i + o_i T)  of its time in prefills, for prompts p_i,
expected outputs o_i and T seconds per token. It keeps the promise T while  a + b * sequences <= T * (1 - share).

The time of a window is the median over the requests that run: all wait for the same steps, and a client that reads slowly
makes only its own tokens late.
"""

from statistics import median
from typing import Final

from kvplane_runtime.admission.line import Line

WINDOW_SECONDS: Final = 0.5
_KEEP: Final = 0.98
"""Of 60 windows half a minute old, about a third of the weight is left."""


class Pace:
    """The learned step time and the share of it that is promised away."""

    def __init__(self) -> None:
        self._steps = Line(keep=_KEEP)
        self.seconds_per_token: float | None = None
        """Of the newest window in which tokens came."""
        self._since: float | None = None
        self._sequences_at = 0.0
        self._sequence_seconds = 0.0
        self._prompt_tokens = 0

    def sequences(self, running: int, *, now: float) -> None:
        """``running`` sequences decoded from the last call until now."""
        self._sequence_seconds += running * max(0.0, now - self._sequences_at)
        self._sequences_at = now

    def prefilled(self, prompt_tokens: int) -> None:
        """A prompt has got its first token."""
        self._prompt_tokens += prompt_tokens

    def due(self, *, now: float) -> bool:
        """Whether a window is over."""
        if self._since is None:
            self._since = self._sequences_at = now
        return now - self._since >= WINDOW_SECONDS

    def close(self, times: list[float], *, seconds_per_prompt_token: float, now: float) -> None:
        """Ends a window: ``times`` are the seconds per token of each request that ran in it."""
        assert self._since is not None  # noqa: S101
        length = now - self._since
        if times:
            self.seconds_per_token = seconds = median(times)
            prefill = seconds_per_prompt_token * self._prompt_tokens / length  # share of the window
            self._steps.add(self._sequence_seconds / length, seconds * max(0.1, 1.0 - prefill))
        self._since = now
        self._sequence_seconds = 0.0
        self._prompt_tokens = 0

    def expected(self, *, sequences: int, prefill_share: float) -> float | None:
        """Seconds per token with so many sequences and that share of the time in prefills; None while unknown."""
        line = self._steps.fit()
        if line is None:
            return None
        intercept, slope = line
        return (intercept + slope * sequences) / max(0.02, 1.0 - prefill_share)
