"""The audit where listings are refused, and where no watch has said anything yet; tests/integration has it on a real API server."""

from collections.abc import Callable
from typing import cast

import pytest

from kvplane_operator.audit import audit_once
from kvplane_operator.cluster import ApiError, Cluster, Listing, RefusedError, UnreachableError
from kvplane_operator.plan.snapshot import Manifest, Version
from kvplane_operator.store import SERVICE, Store
from tests.kvplane_operator.world import settings

CHAT: Manifest = {
    "metadata": {"namespace": "team", "name": "chat", "uid": "u1", "resourceVersion": "2", "generation": 1},
    "spec": {},
}


class Listings:
    """A cluster with one service in namespace team; some kinds of some namespaces cannot be listed."""

    def __init__(self, failing: Callable[[str, str | None], bool], error: ApiError) -> None:
        self._failing = failing
        self._error = error

    async def list_metadata(self, kind: str, namespace: str | None, *, selector: str | None) -> Listing:
        if self._failing(kind, namespace):
            raise self._error
        there = kind == SERVICE and namespace == "team"
        return Listing("9", {("team", "chat"): Version("u1", "2")} if there else {})

    async def find(self, kind: str, namespace: str, name: str) -> Manifest | None:
        assert (kind, namespace, name) == (SERVICE, "team", "chat")
        return CHAT


REFUSED = RefusedError("forbidden: there is no Role any more", code=403)


async def audited(
    failing: Callable[[str, str | None], bool] = lambda kind, namespace: False, *, error: ApiError = REFUSED
) -> tuple[Store, list[str]]:
    """The store after one audit, and what was queued."""
    store, queued = Store(), list[str]()
    await audit_once(
        cluster=cast("Cluster", Listings(failing, error)),
        store=store,
        settings=settings(watch_namespaces=("gone", "team")),
        enqueue=queued.append,
    )
    return store, queued


async def test_all_that_exists_is_known_after_it() -> None:
    """No event may ever say so: where there is nothing to watch, or where the watch is what fails."""
    store, queued = await audited()
    assert queued == ["u1"]
    assert store.complete


async def test_a_namespace_that_is_refused_hides_nothing_of_another() -> None:
    store, queued = await audited(lambda kind, namespace: namespace == "gone")
    assert queued == ["u1"]
    assert store.service("team", "chat") is not None
    assert store.complete


async def test_a_namespace_of_which_one_kind_is_refused_is_not_known() -> None:
    store, queued = await audited(lambda kind, namespace: (kind, namespace) == ("Deployment", "team"))
    assert queued == ["u1"]
    assert not store.complete


async def test_an_api_server_that_does_not_answer_is_asked_again_next_time() -> None:
    with pytest.raises(UnreachableError):
        await audited(lambda kind, namespace: True, error=UnreachableError("no answer"))
