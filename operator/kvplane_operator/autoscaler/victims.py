"""Which replicas go first. The order costs nobody anything first: what does not serve yet, then the emptiest that serve.

Of equally empty ones the youngest goes: its prefix cache is the coldest. A replica whose signals are missing may be full,
so it goes last. On a Deployment the order is handed over as ``controller.kubernetes.io/pod-deletion-cost``; ring groups
are taken by name.
"""

from kvplane_operator.autoscaler.signals import Replica


def order(replicas: tuple[Replica, ...]) -> tuple[str, ...]:
    """Names, the first to go first; without those that are going already."""
    return tuple(replica.name for replica in sorted((r for r in replicas if not r.draining), key=_key))


def deletion_costs(replicas: tuple[Replica, ...], *, going: int) -> dict[str, int]:
    """``pod-deletion-cost`` by name, where so many are about to go: below 0 and rising for those, 0 for all others."""
    return {name: min(0, place - going) for place, name in enumerate(order(replicas))}


def _key(replica: Replica) -> tuple[int, float, float, str]:
    reading = replica.reading
    if not replica.ready:
        # One that cannot start goes before one that is under way, the newest first.
        return (0 if replica.refused else 1, 0.0, -replica.created_at, replica.name)
    if reading is None:
        return (3, 0.0, -replica.created_at, replica.name)
    load = (reading.held_tokens + reading.queued_tokens) / reading.capacity_tokens
    return (2, load, -replica.created_at, replica.name)
