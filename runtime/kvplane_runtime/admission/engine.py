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
        self.block_size: int | None = None
        self.context_tokens: int | None = None
        self.external = 0
        """B_ext in blocks."""
        self.external_sequences = 0
        """Sequences in the engine beyond those known of."""
        self.stale = False
        self._blocks: int | None = None
        self._last: Feedback = Feedback()
        self._differences: tuple[tuple[int, int], ...] = ()
        self._unknown_sequences: tuple[int, ...] = ()
        self._preempted_at = -math.inf
        self._restarted_at = -math.inf

    @property
    def blocks(self) -> int | None:
        """Blocks that requests can use; None while they, or their size, are not known."""
        return None if self.block_size is None else self._blocks

    def observe(
        self,
        feedback: Feedback,
        *,
        held: int,
        held_present: int,
        prompt_blocks: int,
        sequences: int,
        youngest_tokens: int,
        now: float,
    ) -> tuple[float | None, int | None]:
        """Takes in a scrape beside our own sums, in blocks and sequences.

        Tokens preempted and tokens generated since the last scrape; None where unknown. Where only preemptions are
        counted, each is taken as one of the youngest request in flight, which is the one that vLLM preempts.
        """
        last, self._last = self._last, feedback
        self.stale = False
        if feedback.kv_blocks is not None:
            self._blocks = feedback.kv_blocks
        if feedback.block_size_tokens is not None:
            self.block_size = feedback.block_size_tokens
        if feedback.max_model_len_tokens is not None:
            self.context_tokens = feedback.max_model_len_tokens
        preempted: float | None = _more(last.preempted_tokens_total, feedback.preempted_tokens_total)
        if preempted is None:
            count = _more(last.preemptions_total, feedback.preemptions_total)
            preempted = None if count is None else count * youngest_tokens
        if preempted:
            self._preempted_at = now
        self._compare_blocks(feedback, held=held, held_present=held_present, prompt_blocks=prompt_blocks, now=now)
        self._compare_sequences(feedback, sequences=sequences)
        generated = _more(last.generation_tokens_total, feedback.generation_tokens_total)
        return preempted, None if generated is None else int(generated)

    def lost(self) -> None:
        """The scrapes have stopped: only our own accounting counts."""
        self.stale = True
        self._forget()

    def restarted(self, *, now: float) -> None:
        """A new engine with an empty cache."""
        self._forget()
        self._last = Feedback()
        self._preempted_at = -math.inf
        self._restarted_at = now

    def ramp(self, *, now: float) -> float:
        """Share of kappa that a restarted engine gets: from 0.5, rising to 1 in 30 s."""
        return min(1.0, _RAMP_FROM + (1.0 - _RAMP_FROM) * max(0.0, now - self._restarted_at) / RAMP_SECONDS)

    def _forget(self) -> None:
        self._differences, self.external = (), 0
        self._unknown_sequences, self.external_sequences = (), 0

    def _compare_blocks(
        self, feedback: Feedback, *, held: int, held_present: int, prompt_blocks: int, now: float
    ) -> None:
        used = feedback.kv_blocks_used
        if used is None:
            self._differences, self.external = (), 0
            return
        hits = feedback.prefix_hit_ratio or 0.0
        if feedback.thrashing or now - self._preempted_at < _QUIET_SECONDS:
            hits = 0.0
        more, less = max(0, used - held), min(max(0, held_present - used), int(hits * prompt_blocks))
        self._differences = (*self._differences[-1:], (more, less))
        self.external = min(more for more, _ in self._differences) - min(less for _, less in self._differences)

    def _compare_sequences(self, feedback: Feedback, *, sequences: int) -> None:
        if feedback.requests_running is None or feedback.requests_waiting is None:
            self._unknown_sequences, self.external_sequences = (), 0
            return
        more = max(0, feedback.requests_running + feedback.requests_waiting - sequences)
        self._unknown_sequences = (*self._unknown_sequences[-1:], more)
        self.external_sequences = min(self._unknown_sequences)


def _more(before: float | None, after: float | None) -> float | None:
    """How far a counter went; None if unknown, or if it counts from a new start."""
    return None if before is None or after is None or after < before else after - before
