"""When two groups were short of a rank at once, read from every change of their pods."""

from pathlib import Path
from typing import Any

from e2e.cluster.progress import Progress
from e2e.rings.watching import PodWatch, most_short_at_once
from e2e.stack import Stack
from kvplane_api import names

Event = tuple[str, dict[str, Any]]
SIZE = 2


def pod(group: int, rank: int, *, ready: bool = True, going: bool = False, uid: str = "1") -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "name": f"long-ring-{group}-{rank}",
        "uid": f"{group}-{rank}-{uid}",
        "labels": {names.LABEL_GROUP: str(group)},
    }
    if going:
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    return {"metadata": metadata, "status": {"conditions": [{"type": "Ready", "status": "True" if ready else "False"}]}}


def watch(*events: Event) -> PodWatch:
    stack = Stack(kubeconfig=Path("none"), progress=Progress(quiet=True), programs={})
    found = PodWatch(stack, "team", "all")
    found.events = [(float(at), kind, changed) for at, (kind, changed) in enumerate(events)]
    return found


BEGINNING: tuple[Event, ...] = tuple(("ADDED", pod(group, rank)) for group in (0, 1) for rank in range(SIZE))


def lost(group: int) -> tuple[Event, ...]:
    return ("MODIFIED", pod(group, 1, going=True)), ("DELETED", pod(group, 1, going=True))


def back(group: int) -> tuple[Event, ...]:
    return ("ADDED", pod(group, 1, ready=False, uid="2")), ("MODIFIED", pod(group, 1, uid="2"))


def test_pods_that_are_listed_one_by_one_are_not_missing() -> None:
    assert most_short_at_once(watch(*BEGINNING), size=SIZE) == 0


def test_one_group_after_the_other() -> None:
    assert most_short_at_once(watch(*BEGINNING, *lost(0), *back(0), *lost(1), *back(1)), size=SIZE) == 1


def test_two_at_once() -> None:
    assert most_short_at_once(watch(*BEGINNING, *lost(0), *back(0)[:1], *lost(1)), size=SIZE) == 2


def test_a_ring_that_forms_anew_has_lost_nobody() -> None:
    """The ranks that stay may be not Ready for a moment: that is no rank less."""
    assert most_short_at_once(watch(*BEGINNING, *lost(0), ("MODIFIED", pod(1, 0, ready=False))), size=SIZE) == 1


def test_uids_are_of_all_pods_that_there_were() -> None:
    assert watch(*BEGINNING, *lost(0), *back(0)).uids() == {"0-0-1", "0-1-1", "0-1-2", "1-0-1", "1-1-1"}
