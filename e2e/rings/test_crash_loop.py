"""A group that crashes in a loop ends in a verdict, and is no business of the other."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from e2e.rings.conftest import RESTART_BUDGET, SERVICE, Service
from e2e.rings.ring import restarts
from e2e.rings.service import SIZE
from e2e.tests.sidecar import eventually
from e2e.times import tell

pytestmark = pytest.mark.timeout(600)


def test_a_crash_loop_ends_in_a_verdict_and_touches_nobody_else(service: Service) -> None:
    crashing, other = service.ring(0), service.ring(1)
    seconds = _moments(
        service.applied,
        formed=other.is_whole,
        judged=lambda: bool(service.pool().get("failedGroups") == [0]),
        freed=lambda: bool(service.pool().get("failedGroups")) and not crashing.pods(),
    )
    tell(f"a group of {SIZE} is whole {seconds['formed']:.1f} s after kubectl apply, which made two of them")
    tell(
        f"crash loop: the verdict {seconds['judged']:.1f} s, its pods gone {seconds['freed']:.1f} s after kubectl apply"
    )
    assert [restarts(pod) for pod in other.pods()] == [0] * SIZE
    other.await_whole()

    def degraded() -> dict[str, Any]:
        return service.stack.conditions(service.namespace, SERVICE).get("Degraded", {})

    _eventually(lambda: degraded().get("reason") == "RestartBudgetExhausted", degraded)
    assert degraded()["status"] == "True"
    message = degraded()["message"]
    assert f"more than ring.recovery.restartBudget ({RESTART_BUDGET})" in message
    assert "KVPLANE_RING_MAX_SEQUENCES is 00" in message, "the last log lines of the first crash"
    (entry,) = [entry for entry in service.pool()["restarts"] if entry["group"] == 0]
    assert entry["count"] > RESTART_BUDGET


def _moments(began: float, **holds: Callable[[], bool]) -> dict[str, float]:
    """Seconds from ``began`` until each of these held for the first time."""
    seconds: dict[str, float] = {}

    def all_have_held() -> bool:
        for name in holds.keys() - seconds.keys():
            if holds[name]():
                seconds[name] = time.monotonic() - began
        return len(seconds) == len(holds)

    _eventually(all_have_held, lambda: f"held: {seconds}, wanted: {sorted(holds)}")
    return seconds


def _eventually(holds: Callable[[], bool], otherwise: Callable[[], object]) -> None:
    eventually(holds, seconds=240, otherwise=otherwise)
