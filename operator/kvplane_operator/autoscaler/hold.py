"""Is a replica that is idle now worth keeping? Bursts shorter than a start-up can be met only by what is already there.

Need for more than some number of replicas comes and goes; the times between are a renewal process. From the times seen so
far follows the chance that, after as long without need as now, need comes back within one start-up. One replica short
costs ``cost_of_miss`` replicas for that time, one kept costs one: keep while chance x cost_of_miss > 1.
"""

import math
from typing import Final

from kvplane_operator.autoscaler.series import MINUTE, Series

_LEAST_GAPS: Final = 3
"""Times between bursts that are needed to tell anything from."""


def chance_of_need(series: Series, level: int, *, within_seconds: float) -> float:
    """That demand exceeds ``level`` replicas within so long; 0 where too little was seen.

    Counted in minutes: of the gaps that lasted as long as the one of now, and this one, the share that ended in time.
    """
    gaps: list[int] = []
    gap: int | None = None
    """Minutes since the last need; None: not known."""
    before: int | None = None
    for minute, demand in series.minutes:
        if before is not None and minute != before + 1:
            gap = None
        if demand > level:
            if gap:
                gaps.append(gap)
            gap = 0
        elif gap is not None:
            gap += 1
        before = minute
    if gap is None or len(gaps) < _LEAST_GAPS:
        return 0.0
    as_long = [each for each in gaps if each >= gap]
    ended = sum(each < gap + math.ceil(within_seconds / MINUTE) for each in as_long)
    return ended / (len(as_long) + 1)


def worth_keeping(series: Series, *, low: int, asked: int, cost_of_miss: float, within_seconds: float) -> int:
    """Fewest replicas from ``low`` to ``asked`` of which no further one is worth keeping."""
    # Between two values of the demand seen the chance is the same, so only those are asked for.
    levels = sorted({low, *(math.ceil(demand) for _, demand in series.minutes if low < demand < asked)})
    for level in levels:
        if chance_of_need(series, level, within_seconds=within_seconds) * cost_of_miss <= 1:
            return min(level, asked)
    return asked
