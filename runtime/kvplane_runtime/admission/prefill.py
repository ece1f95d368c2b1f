"""Gate B: how much prefill work the engine is given at a time, and how long prefills take.

Two reasons to hold prompts back. What is sent is in the engine's own queue, in the engine's order, and can no longer be
refused in time. And every prompt token that the engine computes delays the next token of all that run. So the prompt
tokens sent and without a first token stay within W. W falls when tokens come slower than promised and rises when there
is room. A prompt longer than W goes when no other prefill is outstanding.
"""

from typing import Final

from kvplane_runtime.admission.line import Line

_KEEP: Final = 0.98
_LEAST: Final = 256.0
_MOST: Final = 65536.0
_FIRST: Final = 2048.0
"""Where the engine's tokens per step are not known."""


class Prefill:
    """W, the prompt tokens within it, and the times to first token seen."""

    def __init__(self, *, batched_tokens: int | None) -> None:
        self.window = float(batched_tokens or _FIRST)
        self.outstanding = 0
        self._times = Line(keep=_KEEP)

    def allows(self, prompt_tokens: int) -> bool:
        """Whether a prompt may be sent now."""
        return self.outstanding == 0 or self.outstanding + prompt_tokens <= self.window

    def learn(self, *, outstanding: int, seconds: float) -> None:
        """Takes in a time to first token, beside the tokens outstanding when it was sent, its own included."""
        self._times.add(outstanding, seconds)

    def seconds(self, outstanding: int) -> float:
        """Expected time to the first token; 0 while too little is known."""
        intercept, slope = self._times.fit() or (0.0, 0.0)
        return intercept + slope * outstanding

    @property
    def seconds_per_token(self) -> float:
        """What one prompt token more costs; 0 while too little is known."""
        return (self._times.fit() or (0.0, 0.0))[1]

    def adapt(self, *, slowness: float) -> None:
        """Takes in a window's time per token as a share of the promised one."""
        if slowness > 1.0:
            self.window = max(_LEAST, 0.8 * self.window)
        elif slowness < 0.8:
            self.window = min(_MOST, 1.05 * self.window)
