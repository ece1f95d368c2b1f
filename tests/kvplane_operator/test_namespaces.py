"""Namespaces that cannot be watched are left out, and waited for."""

import asyncio
from collections.abc import Mapping
from typing import cast

import pytest

from kvplane_operator.cluster import ApiError, Cluster, Listing, NotFoundError, RefusedError, UnreachableError
from kvplane_operator.namespaces import Namespaces

REFUSED = RefusedError("forbidden: there is no Role any more", code=403)


class Listings:
    """A cluster in which some namespaces cannot be listed; `None` is the whole cluster."""

    def __init__(self, failing: Mapping[str | None, ApiError]) -> None:
        self.failing = dict(failing)
        self.asked: list[str | None] = []
        self._news = asyncio.Condition()

    async def list_metadata(self, kind: str, namespace: str | None, *, selector: str | None) -> Listing:
        self.asked.append(namespace)
        async with self._news:
            self._news.notify_all()
        if namespace in self.failing:
            raise self.failing[namespace]
        return Listing("9", {})

    async def was_asked(self, namespace: str, times: int) -> None:
        async with asyncio.timeout(10), self._news:
            await self._news.wait_for(lambda: self.asked.count(namespace) >= times)


async def chosen(wanted: tuple[str, ...], failing: Mapping[str | None, ApiError]) -> tuple[Namespaces, Listings]:
    namespaces, cluster = Namespaces(wanted), Listings(failing)
    await namespaces.choose(cast("Cluster", cluster), poll_seconds=0.001)
    return namespaces, cluster


async def test_one_that_cannot_be_listed_stops_no_other() -> None:
    namespaces, _ = await chosen(("gone", "team"), {"gone": REFUSED})
    assert (namespaces.watched, namespaces.left_out) == (("team",), ("gone",))


async def test_the_whole_cluster_is_asked_for_at_once() -> None:
    namespaces, cluster = await chosen((), {})
    assert (namespaces.watched, namespaces.left_out, cluster.asked) == ((), (), [None])


@pytest.mark.parametrize(
    "failing",
    [
        {"gone": REFUSED, "team": REFUSED},
        {"team": NotFoundError("the server could not find the requested resource", code=404)},
        {"team": UnreachableError("no answer")},
    ],
)
async def test_while_nothing_can_be_listed_it_waits(failing: dict[str | None, ApiError]) -> None:
    namespaces, cluster = Namespaces(("gone", "team")), Listings(failing)
    waiting = asyncio.create_task(namespaces.choose(cast("Cluster", cluster), poll_seconds=0.001))
    await cluster.was_asked("team", 3)
    assert not waiting.done()
    cluster.failing = {"gone": REFUSED}
    await waiting
    assert namespaces.watched == ("team",)


async def test_one_that_can_be_listed_again_ends_the_wait_for_it() -> None:
    namespaces, cluster = await chosen(("gone", "team"), {"gone": REFUSED})
    waiting = asyncio.create_task(namespaces.join(cast("Cluster", cluster), look_seconds=0.001))
    await cluster.was_asked("gone", 3)
    assert not waiting.done()
    cluster.failing = {"gone": UnreachableError("no answer")}
    await cluster.was_asked("gone", 6)
    assert not waiting.done()
    cluster.failing = {}
    await waiting
