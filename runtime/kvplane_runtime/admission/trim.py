"""Gate A's learned factor: requests are admitted while their predicted KV peak is at most kappa x capacity.

Tokens thrown away by preemptions are spent from a budget: every processed token earns ``WASTE_SHARE`` of a token. kappa
rises with what is earned and falls with what is spent, so it settles where the engine recomputes about that share, or at
its bounds. That is the price that counts: a preemption of a short context is cheap and lets kappa rise above 1, one of a
long context is dear. It rises above 1 only while KV is what keeps requests waiting and the goals are met, and never while
the engine does not say what it preempts.
"""

from typing import Final

FLOOR: Final = 0.85
WASTE_SHARE: Final = 0.003
"""Share of the processed tokens that may be computed twice."""
_CEILING: Final = 1.25
_GAIN: Final = 0.5
"""Change of kappa for tokens worth one whole capacity."""
_BUSY: Final = 0.7
"""Share of the capacity that must be wanted for a quiet engine to say anything."""


class Trim:
    """kappa between the floor and the ceiling; starts at 1."""

    def __init__(self) -> None:
        self.kappa = 1.0

    def learn(
        self, *, processed: float, preempted: float, capacity: float, peak_ratio: float, pays: bool, fixed: float | None
    ) -> None:
        """Takes in the tokens ``processed`` and ``preempted`` since the last call, beside a ``capacity`` in tokens.

        ``peak_ratio``: M over the capacity. ``pays``: more KV would let requests in, and the goals are met. ``fixed``: the
        user's ceiling.
        """
        ceiling = _CEILING if fixed is None else fixed
        step = -preempted
        if peak_ratio >= _BUSY and (pays or self.kappa < min(1.0, ceiling)):
            step += WASTE_SHARE * processed
        floor = min(FLOOR, ceiling)
        self.kappa = max(floor, min(ceiling, self.kappa + _GAIN * step / capacity))
