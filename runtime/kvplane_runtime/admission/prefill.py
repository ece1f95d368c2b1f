"""Gate B: how much prefill work the engine is given at a time, and how long prefills take.

What is sent stands in the engine's own queue, in the engine's order, and can no longer be refused in time. So the prompt
tokens sent and without a first token stay within W, and *our* order decides. W starts at what the engine computes in one
step, and is then what it computes in two promised times per token, by measurement: what it computes now, and what it goes
on with, so that it never runs dry and a burst of short prompts shares its steps. While all that wait would get their first token
in time in whatever order, W is four times that: to hold a burst back would only delay it. A prefix cache that makes prompts
cheap makes W wide. A prompt longer than W goes when no other is under way.

What prefills do to the tokens of those that run is weighed by :mod:`goals`.
"""

from typing import Final

from kvplane_runtime.admission.line import Line

_KEEP: Final = 0.98
_FIRST: Final = 2048
"""W where the engine's tokens per step are not known."""
_STEPS: Final = 2
"""Of a promised time per token, within W."""
_MOST_STEPS: Final = 8
"""The same while all are in time: an output must not begin with a wait for many prompts of the same burst."""


class Prefill:
    """The prompt tokens under way, and the times to first token seen."""

    def __init__(self) -> None:
        self.outstanding = 0
        self._times = Line(keep=_KEEP, through_origin=True, doubt=32.0**2)

    def allows(self, prompt_tokens: int, *, promised: float, batched_tokens: int | None, in_time: bool) -> bool:
        """Whether a prompt may be sent now.

        ``promised`` seconds per token; ``batched_tokens`` of one engine step; ``in_time``: all that wait would be.
        """
        cost = self.seconds_per_token
        window = (_MOST_STEPS if in_time else _STEPS) * promised / cost if cost > 0 else batched_tokens or _FIRST
        return self.outstanding == 0 or self.outstanding + prompt_tokens <= window

    def learn(self, *, outstanding: int, seconds: float) -> None:
        """Takes in a time to first token, beside the tokens outstanding when it was sent, its own included."""
        self._times.add(outstanding, seconds)

    def seconds(self, outstanding: int) -> float:
        """Expected time to the first token; 0 while too little is known."""
        intercept, slope = self._times.fit() or (0.0, 0.0)
        return intercept + slope * outstanding

    @property
    def under_way(self) -> float:
        """Seconds until what is outstanding is computed; 0 while too little is known."""
        return self.seconds_per_token * self.outstanding

    @property
    def seconds_per_token(self) -> float:
        """What one prompt token more costs; 0 while too little is known."""
        return (self._times.fit() or (0.0, 0.0))[1]
