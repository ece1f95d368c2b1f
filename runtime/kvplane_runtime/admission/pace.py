"""How long an engine step takes, learned from the tokens that pass.

Every running sequence gets one token per step, and a step takes the longer the more sequences share it. From windows of
half a second this learns

    step without prefills  =  a + b x sequences

where the time that went into prefills is taken out first. The time of a window is the median over the requests that run:
all wait for the same steps, and a client that reads slowly makes only its own tokens late.
"""

from statistics import median
from typing import Final

from kvplane_runtime.admission.line import Line

_WINDOW_SECONDS: Final = 0.5
_KEEP: Final = 0.98
"""Of windows half a minute old, about a third of the weight is left."""
_LEAST_DECODING: Final = 0.1
"""Least share of a window that is taken to have gone into decoding."""


class Pace:
    """Windows, and the line through them."""

    def __init__(self) -> None:
        self.seconds_per_token: float | None = None
        """Of the newest window in which tokens came, prefills included."""
        self._steps = Line(keep=_KEEP, through_origin=False, doubt=1.0)
        self._since: float | None = None
        self._counted_to = 0.0
        self._sequence_seconds = 0.0
        self._prompt_tokens = 0

    def sequences(self, decoding: int, *, now: float) -> None:
        """``decoding`` sequences ran from the last call until now."""
        self._sequence_seconds += decoding * max(0.0, now - self._counted_to)
        self._counted_to = now

    def prefilled(self, prompt_tokens: int) -> None:
        """A prompt has got its first token."""
        self._prompt_tokens += prompt_tokens

    def window(self, *, now: float) -> float | None:
        """Length of the window if it is over, else None."""
        if self._since is None:
            self._since = self._counted_to = now
        length = now - self._since
        return length if length >= _WINDOW_SECONDS else None

    def close(self, length: float, times: list[float], *, seconds_per_prompt_token: float, now: float) -> None:
        """Ends a window: ``times`` are the seconds per token of each request that got tokens in it."""
        if times:
            self.seconds_per_token = median(times)
            decoding = max(_LEAST_DECODING, 1.0 - seconds_per_prompt_token * self._prompt_tokens / length)
            self._steps.add(self._sequence_seconds / length, self.seconds_per_token * decoding)
        self._since = now
        self._sequence_seconds = 0.0
        self._prompt_tokens = 0

    def step(self, sequences: int) -> float | None:
        """Seconds of a step with so many sequences and no prefill; None while too little is known."""
        line = self._steps.fit()
        return None if line is None else line[0] + line[1] * sequences
