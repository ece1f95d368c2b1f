"""Ring groups as values, for tests of the decisions about them."""

from dataclasses import replace
from datetime import datetime, timedelta

from kvplane_operator.plan.ring.groups import Group, Rank
from tests.kvplane_operator.world import NOW

OLD, NEW = "old", "new"


def rank(number: int, ordinal: int, *, template: str = NEW, **fields: object) -> Rank:
    """A rank that is in its ring since long ago."""
    usual: dict[str, object] = {"ready": True, "since": ago(3600), "ip": f"10.0.{number}.{ordinal}"}
    pod = f"chat-ring-{number}-{ordinal}"
    return Rank(ordinal, pod, f"uid-{pod}", template=template, **{**usual, **fields})  # type: ignore[arg-type]


def group(
    number: int,
    *,
    size: int = 3,
    template: str = NEW,
    pods: str | None = None,
    missing: int = 0,
    down_seconds: float | None = None,
    in_flight: int | None = 0,
    drain_seconds: float | None = None,
    exited: tuple[int, ...] = (),
) -> Group:
    """A group that serves: ``missing`` of its last ranks have no pod; ``down_seconds``: it has had no ring for so long;
    ``drain_seconds``: it has been drained for so long; ``pods``: the template of its pods, if not its set's; ``exited``: ranks
    whose engine has."""
    made = pods or template
    ready = down_seconds is None
    since = ago(3600 if down_seconds is None else down_seconds)
    ranks = [rank(number, ordinal, template=made, ready=ready, since=since) for ordinal in range(size - missing)]
    drains = drain_seconds is not None
    if ranks:
        ranks[0] = rank(
            number,
            0,
            template=made,
            ready=ready and not drains,
            since=since,
            in_flight=in_flight,
            draining=drains,
            drain_since=None if drain_seconds is None else ago(drain_seconds),
        )
    ranks = [replace(rank, exited=rank.ordinal in exited) for rank in ranks]
    return Group(number, size, template, tuple(ranks))


def ago(seconds: float) -> datetime:
    """That long before now."""
    return NOW - timedelta(seconds=seconds)
