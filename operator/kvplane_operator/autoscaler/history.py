"""What one decision leaves to the next.

Everything is bounded: by the replicas there are (``meters``, ``known``, ``refused``), or by a fixed number. Part of it survives
a restart of the operator, see ``document``; the rest is seen again within one window, in which nothing goes down.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from kvplane_operator.autoscaler.flows import Meter
from kvplane_operator.autoscaler.forecast import Outlook
from kvplane_operator.autoscaler.learned import Learned, Usable
from kvplane_operator.autoscaler.panic import Panic
from kvplane_operator.autoscaler.series import Series
from kvplane_operator.autoscaler.settings import Tuning
from kvplane_operator.autoscaler.startup import StartTimes

GAP_SECONDS: Final = 60.0
"""After so long without a decision, or without all signals, what was seen before no longer counts as watched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """State of one service's autoscaler."""

    learned: Learned
    starts: StartTimes = field(default_factory=StartTimes)
    series: Series = field(default_factory=Series)
    outlook: Outlook = field(default_factory=Outlook)
    panic: Panic = field(default_factory=Panic)
    idle_since: float | None = None
    """Since when no request was there; ``None``: there are some, or it cannot be told. Does not survive a restart."""

    # Of this process only.
    began_at: float | None = None
    """First decision since the restart."""
    decided_at: float | None = None
    """Last decision."""
    watched_since: float | None = None
    """Since when all signals are there, but for short gaps; ``None``: they are not."""
    watched_at: float | None = None
    """When all signals were there last."""
    meters: Mapping[str, Meter] = field(default_factory=dict)
    known: frozenset[str] | None = None
    """Replicas that were ready before, or may have been, so that each start is timed once; ``None``: nobody has looked yet."""
    refused: Mapping[str, float] = field(default_factory=dict)
    """Seconds for which each replica that is not ready yet was seen refused."""
    asked: tuple[tuple[float, int], ...] = ()
    """(time, replicas) of the decisions within ``step_seconds``."""


def fresh(tuning: Tuning) -> History:
    """The history of a service that was never seen."""
    return History(learned=Learned(usable=Usable(share=tuning.usable_start)))


def resumed(history: History, *, now: float) -> History:
    """The history at the beginning of a decision: without what a pause, or a clock that was set back, has made worthless."""
    last = history.decided_at
    restarted = last is None or now < last - GAP_SECONDS
    if not restarted and last is not None and now - last <= GAP_SECONDS:
        return history
    return replace(
        history,
        idle_since=None,
        began_at=now if restarted else history.began_at,
        decided_at=None,
        watched_since=None,
        watched_at=None,
        meters={},
        known=None,
        refused={},
        asked=(),
        learned=replace(history.learned, room=history.learned.room.resumed()),
    )
