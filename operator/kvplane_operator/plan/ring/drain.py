"""When a group that is drained holds nobody's request any more.

The operator marks rank 0 (``drain-since``) and asks its sidecar, which takes no new requests and says how many it holds.
The mark stands in the pod, so that a drain survives a change of leader, and ends with the pod.
"""

from datetime import datetime

from kvplane_api.names import DRAIN_GRACE_SECONDS
from kvplane_operator.plan.ring.groups import Group


def drained(group: Group, *, now: datetime, drain_seconds: int) -> bool:
    """Whether nothing is to be waited for: the sidecar holds nothing after the grace in which it still serves, or the time
    is over, or no rank 0 was drained to begin with."""
    leader = group.leader
    if leader is None or leader.drain_since is None:
        return leader is None
    waited = (now - leader.drain_since).total_seconds()
    empty = leader.draining and leader.in_flight == 0
    return waited >= DRAIN_GRACE_SECONDS + drain_seconds or (waited >= DRAIN_GRACE_SECONDS and empty)


def remaining_seconds(group: Group, *, now: datetime, drain_seconds: int) -> float:
    """Time until the drain ends by itself; what ends it before comes with a reading of the sidecar."""
    leader = group.leader
    began = leader.drain_since if leader is not None else None
    waited = (now - began).total_seconds() if began is not None else 0.0
    empty = leader is not None and leader.draining and leader.in_flight == 0
    whole = DRAIN_GRACE_SECONDS if empty else DRAIN_GRACE_SECONDS + drain_seconds
    return max(0.0, whole - waited)
