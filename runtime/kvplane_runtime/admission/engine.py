"""What admission knows of the engine: its capacity, the KV in use that is not ours, and whether to believe it.

B_ext is the KV in use beyond the requests known of: after a restart of the sidecar, those of the one before. It is the
lesser of two scrapes, since a scrape and the tokens seen are never of one moment. It is negative where known requests
share prefixes: only where the engine reports hits, at most by that share of the prompts, and not while it preempts or
thrashes (a preempted request holds nothing, which would look like sharing).
"""

import math
from typing import Final

from kvplane_runtime.admission.demand import Feedback

RAMP_SECONDS: Final = 30.0
_RAMP_FROM: Final = 0.5
_QUIET_SECONDS: Final = 10.0


class EngineView:
    """The newest scrape and what follows from it."""

    def __init__(self) -> None:
        self.blocks: int | None = None
        self.block_size: int | None = None
        self.context_tokens: int | None = None
        self.external = 0
        """B_ext in blocks."""
        self.stale = False
        self._differences: tuple[tuple[int, int], ...] = ()
        self._counters: tuple[int | None, float | None] = (None, None)
        self._preempted_at = -math.inf
        self._restarted_at = -math.inf

    def observe(
        self, feedback: Feedback, *, held: int, held_present: int, prompt_blocks: int, youngest_tokens: int, now: float
    ) -> float | None:
        """Takes in a scrape beside our own sums, in blocks; tokens preempted since the last one, None if unknown.

        Where only preemptions are counted, each is taken as one of the youngest request in flight, which is the one that
        vLLM preempts (``youngest_tokens``).
        """
        self.stale = False
        if feedback.kv_blocks is not None:
            self.blocks = feedback.kv_blocks
        if feedback.block_size_tokens is not None:
            self.block_size = feedback.block_size_tokens
        if feedback.max_model_len_tokens is not None:
            self.context_tokens = feedback.max_model_len_tokens
        preempted = self._preempted(feedback, youngest_tokens=youngest_tokens, now=now)
        if feedback.kv_blocks_used is None:
            self._differences, self.external = (), 0
            return preempted
        shares = feedback.prefix_hit_ratio if feedback.prefix_hit_ratio and not feedback.thrashing else 0.0
        if now - self._preempted_at < _QUIET_SECONDS:
            shares = 0.0
        more = max(0, feedback.kv_blocks_used - held)
        less = min(max(0, held_present - feedback.kv_blocks_used), int(shares * prompt_blocks))
        self._differences = (*self._differences[-1:], (more, less))
        self.external = min(more for more, _ in self._differences) - min(less for _, less in self._differences)
        return preempted

    def lost(self) -> None:
        """The scrapes have stopped: only our own accounting counts."""
        self.stale = True
        self._differences, self.external = (), 0

    def restarted(self, *, now: float) -> None:
        """A new engine with an empty cache."""
        self._differences, self.external = (), 0
        self._counters = (None, None)
        self._preempted_at = -math.inf
        self._restarted_at = now

    def ramp(self, *, now: float) -> float:
        """Share of kappa that a restarted engine gets: from 0.5, rising to 1 in 30 s."""
        return min(1.0, _RAMP_FROM + (1.0 - _RAMP_FROM) * max(0.0, now - self._restarted_at) / RAMP_SECONDS)

    def _preempted(self, feedback: Feedback, *, youngest_tokens: int, now: float) -> float | None:
        (count, tokens), self._counters = self._counters, (feedback.preemptions_total, feedback.preempted_tokens_total)
        more: float | None = None
        if tokens is not None and feedback.preempted_tokens_total is not None:
            more = feedback.preempted_tokens_total - tokens
        elif count is not None and feedback.preemptions_total is not None:
            more = float(feedback.preemptions_total - count) * youngest_tokens
        if more is not None and more > 0:
            self._preempted_at = now
        return None if more is None or more < 0 else more  # fewer than before: another engine counts
