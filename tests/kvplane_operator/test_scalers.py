"""Who else scales is looked for, told to whom it concerns, and nothing breaks where nobody may look."""

import asyncio
import contextlib
from typing import Any, cast

import pytest

from kvplane_operator.cluster import ApiError, Cluster, NotFoundError, RefusedError, UnreachableError
from kvplane_operator.plan.snapshot import Scaler
from kvplane_operator.scalers import (
    FIRST_SECONDS,
    FIRST_TRIES,
    LOOK_SECONDS,
    REFUSED_SECONDS,
    concerned,
    look_for_scalers,
)
from kvplane_operator.store import SERVICE, Store
from tests.kvplane_operator.world import settings

LLM = {"apiVersion": "kvplane.dev/v1alpha1", "kind": "LLMService", "name": "chat"}
DEPLOYMENT = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "chat"}


def hpa(name: str, target: dict[str, Any] | None, namespace: str = "team") -> dict[str, Any]:
    spec = {} if target is None else {"scaleTargetRef": target}
    return {"metadata": {"name": name, "namespace": namespace}, "spec": spec}


class Listed:
    """An API server that lists these, or fails."""

    def __init__(self, *found: dict[str, Any]) -> None:
        self.found = list(found)
        self.error: ApiError | None = None
        self.forbidden: set[str | None] = set()
        """Namespaces that may not be listed."""
        self.asked: list[tuple[float, str | None]] = []

    async def list_pod_autoscalers(self, namespace: str | None) -> list[dict[str, Any]]:
        self.asked.append((asyncio.get_running_loop().time(), namespace))
        if self.error is not None:
            raise self.error
        if namespace in self.forbidden:
            raise RefusedError("forbidden", code=403)
        return self.found


class Unsteady(Listed):
    """One that does not answer at first."""

    def __init__(self, *, failures: int) -> None:
        super().__init__()
        self._failures = failures

    async def list_pod_autoscalers(self, namespace: str | None) -> list[dict[str, Any]]:
        self.error = UnreachableError("no answer") if len(self.asked) < self._failures else None
        return await super().list_pod_autoscalers(namespace)


@pytest.fixture
def store() -> Store:
    store = Store()
    metadata = {"name": "chat", "namespace": "team", "uid": "u1", "resourceVersion": "1", "generation": 1}
    store.put(SERVICE, {"metadata": metadata, "spec": {}})
    return store


def scalers(store: Store) -> tuple[Scaler, ...]:
    snapshot = store.snapshot("u1")
    assert snapshot is not None
    return snapshot.scalers


async def looked(store: Store, listed: Listed, *, seconds: float = 1.0, **values: Any) -> list[str]:
    """Services that were told, after so much looking."""
    told: list[str] = []
    looking = look_for_scalers(
        cluster=cast("Cluster", listed),
        store=store,
        settings=settings(**values),
        enqueue=told.append,
        looked=asyncio.Event(),
    )
    task = asyncio.create_task(looking)
    await asyncio.sleep(seconds)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return told


@pytest.mark.parametrize(
    ("target", "service"),
    [
        (LLM, "chat"),
        (DEPLOYMENT, "chat"),
        ({"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "chat-ring-12"}, "chat"),
        ({"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "chat-ring-x"}, None),
        ({"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "chat"}, None),
        ({"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "chat-1"}, None),
        ({"apiVersion": "example.com/v1", "kind": "LLMService", "name": "chat"}, None),
        ({"kind": "Deployment", "name": "chat"}, None),
        ({}, None),
    ],
    ids=str,
)
def test_whom_a_target_concerns(target: dict[str, Any], service: str | None) -> None:
    assert concerned(target) == service


async def test_what_is_found_is_told_once(store: Store) -> None:
    listed = Listed(hpa("b", LLM), hpa("a", DEPLOYMENT), hpa("other", {**LLM, "name": "mail"}), hpa("none", None))
    assert await looked(store, listed, seconds=100) == ["u1"]
    assert scalers(store) == (Scaler("a", "Deployment", "chat"), Scaler("b", "LLMService", "chat"))
    times = [at for at, _ in listed.asked]
    assert times == pytest.approx([times[0] + LOOK_SECONDS * n for n in range(4)])


async def test_one_that_goes_is_forgotten(store: Store) -> None:
    await looked(store, Listed(hpa("a", DEPLOYMENT)))
    assert await looked(store, Listed()) == ["u1"]
    assert scalers(store) == ()


async def test_that_of_another_namespace_is_none_of_ours(store: Store) -> None:
    assert await looked(store, Listed(hpa("a", DEPLOYMENT, namespace="other"))) == []
    assert scalers(store) == ()


async def test_only_namespaces_that_are_watched_are_asked_for(store: Store) -> None:
    listed = Listed()
    await looked(store, listed, watch_namespaces=("team", "other"))
    assert [namespace for _, namespace in listed.asked] == ["team", "other"]


REFUSALS = [RefusedError("forbidden", code=403), NotFoundError("no such API", code=404)]


@pytest.mark.parametrize("error", REFUSALS)
async def test_without_the_right_or_the_api_nobody_is_known_and_it_is_asked_rarely(
    store: Store, error: ApiError
) -> None:
    listed = Listed()
    listed.error = error
    assert await looked(store, listed, seconds=REFUSED_SECONDS + 1) == []
    assert scalers(store) == ()
    assert len(listed.asked) == 2


@pytest.mark.parametrize("watched", [(), ("team",)], ids=str)
@pytest.mark.parametrize("error", REFUSALS)
async def test_a_refusal_makes_nobody_forget_who_scales(
    store: Store, error: ApiError, watched: tuple[str, ...]
) -> None:
    """A refusal may pass, and a service whose scaler is forgotten gets spec.replicas, over what that one asked for. So the
    scaler goes only when a listing succeeds that does not have it.
    """
    listed = Listed(hpa("a", DEPLOYMENT))
    await looked(store, listed, watch_namespaces=watched)
    listed.error = error
    assert await looked(store, listed, seconds=REFUSED_SECONDS - 1, watch_namespaces=watched) == []
    assert scalers(store) == (Scaler("a", "Deployment", "chat"),)
    assert await looked(store, Listed(), watch_namespaces=watched) == ["u1"]
    assert scalers(store) == ()


async def test_one_that_goes_is_forgotten_while_another_namespace_is_refused(store: Store) -> None:
    watched = ("team", "other")
    await looked(store, Listed(hpa("a", DEPLOYMENT)), watch_namespaces=watched)
    listed = Listed()
    listed.forbidden = {"other"}
    assert await looked(store, listed, watch_namespaces=watched) == ["u1"]
    assert scalers(store) == ()


async def test_a_namespace_that_may_not_be_listed_hides_no_other(store: Store) -> None:
    listed = Listed(hpa("a", DEPLOYMENT))
    listed.forbidden = {"other"}
    await looked(store, listed, seconds=100, watch_namespaces=("other", "team"))
    assert scalers(store) == (Scaler("a", "Deployment", "chat"),)
    asked = [namespace for _, namespace in listed.asked]
    assert (asked.count("other"), asked.count("team")) == (1, 4)


async def test_an_outage_changes_nothing(store: Store) -> None:
    listed = Listed(hpa("a", DEPLOYMENT))
    await looked(store, listed)
    listed.error = UnreachableError("no answer")
    assert await looked(store, listed, seconds=100) == []
    assert scalers(store) == (Scaler("a", "Deployment", "chat"),)


@pytest.mark.parametrize(
    ("failures", "seconds"), [(0, 0.0), (1, FIRST_SECONDS), (9, (FIRST_TRIES - 1) * FIRST_SECONDS)]
)
async def test_whoever_waits_for_the_first_look_waits_for_an_answer_but_not_for_ever(
    store: Store, failures: int, seconds: float
) -> None:
    """Reconciles wait: they would write spec.replicas over what somebody else's scaler asks for."""
    cluster, first = cast("Cluster", Unsteady(failures=failures)), asyncio.Event()
    loop = asyncio.get_running_loop()
    began = loop.time()
    looking = look_for_scalers(cluster=cluster, store=store, settings=settings(), enqueue=lambda _: None, looked=first)
    task = asyncio.create_task(looking)
    await first.wait()
    assert loop.time() - began == pytest.approx(seconds)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
